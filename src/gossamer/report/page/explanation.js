const FOLDED_FROM = 40;
const percent = (share) => (100 * share).toFixed(0) + " %";
const linkName = ([layer, head, query, key]) =>
  [`layer ${layer} head ${head}: `, token(data.tokens[query]), ` (${query}) reads `, token(data.tokens[key]), ` (${key})`];
const same = (a, b) => a.every((value, place) => value === b[place]);

function tiles(pairs) {
  return element("div", { class: "tiles" }, pairs.filter(([, value]) => value !== null).map(([name, value]) =>
    element("div", { class: "tile" }, element("b", {}, value), element("span", {}, name))));
}

function predictionSection() {
  const prompt = element("div", { class: "tokens", "aria-label": "Prompt" },
    data.tokens.map((text, place) => element("span", { class: "token", title: "position " + place }, shown(text))));
  const against = data.against ? [" rather than ", token(data.against.text)] : [];
  section("prediction", "Prediction", prompt,
    element("p", {}, "Why ", element("b", {}, token(data.target.text)), ...against, ` comes next. The metric is the ${data.metric} of this token: ` +
      `${number(data.metric_full)} with every attention link, ${number(data.metric_none)} with none. All shares below are shares of this difference.`),
    tiles([
      ["links in the explanation, of " + number(data.candidates), number(data.size)],
      ["is kept by them alone", percent(data.kept)],
      ["is left without them", percent(data.left_when_cut)],
      ["overlap of the sets of " + data.seeds.length + " seeds (Jaccard)", data.overlap === null ? null : number(data.overlap, 2)],
      ["times as many links in the dense model", data.dense ? number(data.dense_links_per_link, 1) : null],
    ]),
    element("p", { class: "soft" }, data.kind === "complete"
      ? "The set is complete: the links alone keep this share, and without them no more than the rest is left."
      : "The set is sufficient: with all other links cut, this share is kept. Other sets may be sufficient too; what is left without this one says how much they carry."));
}

// Tokens that a link touches, and a mark for each run of others.
function columns(links, folded) {
  const touched = new Set([data.tokens.length - 1]);
  links.forEach(([, , query, key]) => { touched.add(query); touched.add(key); });
  const found = [];
  data.tokens.forEach((text, place) => {
    if (!folded || touched.has(place)) found.push({ label: shown(text).slice(0, 12), places: [place] });
    else if (found.length && found[found.length - 1].gap) found[found.length - 1].places.push(place);
    else found.push({ label: "…", places: [place], gap: true });
  });
  return found;
}

function arcs(record, links, strength, color, folded, chosen, choose) {
  const tokens = columns(links, folded), column = new Map();
  tokens.forEach(({ places }, at) => places.forEach((place) => column.set(place, at)));
  const layers = 1 + largest(record.links.map((link) => link[0]), 0);
  const wide = Math.max(360, 40 + tokens.length * 40), rise = Math.max(12, Math.min(40, 480 / layers)), inset = 60;
  const x = (place) => inset + (column.get(place) + .5) * (wide - inset - 4) / tokens.length;
  const y = (level) => 12 + (layers - level) * rise;
  const svg = drawn("svg", { viewBox: `0 0 ${wide} ${layers * rise + 90}`, role: "img", style: `min-width:${Math.min(wide, 900)}px;max-width:${1.3 * wide}px`,
    "aria-label": `${links.length} links of the ${color} model` });
  for (let level = 0; level <= layers; level += layers > 12 ? 5 : 1)
    svg.append(drawn("line", { x1: 32, x2: wide, y1: y(level), y2: y(level), class: "grid" }),
      drawn("text", { x: 2, y: y(level) + 4, class: "soft" }, level ? String(level - 1) : "in"));
  tokens.forEach(({ label, places }) => svg.append(drawn("text", { x: 0, y: 0, "text-anchor": "end", direction: "ltr",
    style: "unicode-bidi:isolate", transform: `translate(${x(places[0]) + 4},${y(0) + 12}) rotate(-50)` }, label)));
  const most = largest(links.map(strength), 1e-9);
  for (const link of links.slice(0, MOST_DRAWN)) {
    const [layer, , query, key] = link, picked = chosen && same(link, chosen);
    const found = record.found_by[record.places.get(link.join())] ?? 0;
    const path = drawn("path", {
      d: `M${x(key)},${y(layer)} C${x(key)},${y(layer + .5)} ${x(query)},${y(layer + .5)} ${x(query)},${y(layer + 1)}`,
      fill: "none", stroke: picked ? ink("--mark") : ink(color, found === 1 ? .85 : .4),
      "stroke-width": (picked ? 2 : 0) + 0.8 + 5 * strength(link) / most, style: "cursor:pointer" },
      drawn("title", {}, `layer ${layer} head ${link[1]}: ${shown(data.tokens[query])} reads ${shown(data.tokens[key])}`));
    path.addEventListener("pointerenter", () => choose(link, true));
    path.addEventListener("click", () => choose(link));
    svg.append(path);
  }
  return element("div", { class: "scroll" }, svg);
}

function describe(record, link) {
  if (!link) return element("p", { class: "soft" }, "Point at a link, or click one in the list, to see what it does and why it is open.");
  const detail = record.details.find((one) => same(one.link, link));
  if (!detail) return element("p", {}, ...linkName(link), ". Only the strongest links were examined one by one; this is not one of them.");
  const list = (texts) => texts.map((text) => [" ", token(text)]).flat();
  const rows = detail.tests.map((test) => [`${test.writer} at the ${test.side}`, test.part, test.gate_fixed, test.gate_recomputed, test.closes ? "closes" : "stays open"]);
  return element("div", {},
    element("p", {}, element("b", {}, ...linkName(link)), `. Attention weight ${number(detail.weight, 2)}, gate logit ${number(detail.gate, 2)}. ` +
      `Cut from the set it loses ${percent(detail.lost_from_set)}, cut alone from the whole model ${percent(detail.lost_alone)}. ` +
      `Found by ${percent(detail.found_by)} of the seeds.`),
    element("p", {}, "What it writes promotes", ...list(detail.promotes), " and demotes", ...list(detail.demotes), ", read off through the unembedding (direct logit attribution). For early layers this says little."),
    element("h3", {}, "Why it is open"),
    element("p", { class: "soft" }, "The attention logit is a sum over pairs: what one component wrote into the query, and one into the key. These are its largest terms. " +
      "a3.h5 is head 5 of layer 3, m3 the MLP of layer 3, input the embeddings."),
    element("table", {}, element("thead", {}, element("tr", {}, ["wrote the query", "wrote the key", "term of the logit"].map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, detail.pairs.map((pair) => element("tr", {}, [pair.query, pair.key, number(pair.part, 2)].map((cell) => element("td", {}, cell)))))),
    rows.length ? element("div", { class: "scroll" }, element("table", { class: "tests" }, element("thead", {}, element("tr", {}, ["without", "its part", "gate logit, norms fixed", "gate logit, norms recomputed", ""].map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell) => element("td", {}, typeof cell === "number" ? number(cell, 2) : cell))))))) : null);
}

function linksSection(id, title, record, color) {
  record.places = new Map(record.links.map((link, place) => [link.join(), place]));
  const lost = new Map(record.details.map((one) => [one.link.join(), Math.abs(one.lost_from_set)]));
  const strength = (link) => lost.get(link.join()) ?? 0;
  const shares = Object.keys(record.shares).sort((a, b) => a - b);
  let share = Math.max(0, shares.findIndex((one) => Number(one) === record.share)), chosen = null;
  let folded = data.tokens.length > FOLDED_FROM;
  const picture = element("div"), says = element("output"), details = element("div", { "aria-live": "polite" });
  const wanted = () => `Share to keep: at least ${percent(shares[share])}`;
  const sliderName = element("span", {}, shares.length ? wanted() : "");
  const slider = element("input", { type: "range", min: 0, max: shares.length - 1, step: 1, value: share,
    oninput: (event) => { share = Number(event.target.value); sliderName.textContent = wanted(); draw(); } });
  const fold = element("input", { type: "checkbox", onchange: (event) => { folded = event.target.checked; draw(); } });
  fold.checked = folded;
  const list = element("ol", { class: "sentences" }, record.details.map((one) => element("li", {},
    element("button", { type: "button", onclick: () => choose(one.link) }, ...linkName(one.link), ` · ${percent(one.lost_from_set)}`))));
  function choose(link, pointed = false) {
    chosen = link;
    details.replaceChildren(describe(record, link));
    if (!pointed) draw();
    [...list.querySelectorAll("button")].forEach((button, place) =>
      button.setAttribute("aria-current", String(same(record.details[place].link, link))));
  }
  function draw() {
    const set = shares.length ? record.shares[shares[share]] : record;
    const links = [...set.links].sort((a, b) => strength(b) - strength(a));
    says.textContent = `${number(set.size)} links keep ${percent(set.kept)}; ${percent(set.left_when_cut)} is left without them.` +
      (links.length > MOST_DRAWN ? ` The ${number(MOST_DRAWN)} strongest are drawn.` : "");
    picture.replaceChildren(arcs(record, links, strength, color, folded, chosen, choose));
  }
  details.append(describe(record, null));
  section(id, title, element("div", { class: "controls" },
    shares.length > 1 ? element("label", {}, sliderName, slider) : null,
    element("label", {}, "Fold tokens that no link touches", fold)), says, picture,
    element("p", { class: "soft" }, "Each arc is a link: from the token that is read, up one layer, to the token that reads it; a vertical one is a token that reads itself. " +
      "Numbers are layers; “in” is the embeddings. Thicker: more is lost without the link. Paler: not every seed found it."),
    element("div", { class: "pair" }, element("div", {}, element("h3", {}, "Strongest links, and the share lost without each"), list), details),
    numbers(["layer", "head", "query", "key", "found by"], record.links.slice(0, MOST_DRAWN).map((link, place) => [...link, record.found_by[place]])));
  redraws.push(draw);
  draw();
}

predictionSection();
linksSection("links", data.dense ? "Links of the sparse model" : "Links", data, "sparse");
if (data.dense) linksSection("dense", "Links of the dense model", data.dense, "dense");
