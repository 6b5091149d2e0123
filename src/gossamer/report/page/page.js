function summarySection() {
  section("figures", "Figures", element("div", { class: "tiles" }, Object.entries(data.summary).map(([name, value]) =>
    element("div", { class: "tile" }, element("b", {}, value), element("span", {}, name)))));
}

// Attention of one prompt: weight(layer, head, query, key).
function weightsOf(prompt, record) {
  const { layers, heads } = data.attention, tokens = prompt.tokens.length, triangle = tokens * (tokens + 1) / 2;
  const values = new Float32Array(layers * heads * triangle);
  if (record.triangles !== undefined) {
    const bytes = atob(record.triangles);
    for (let i = 0; i < values.length; i++) values[i] = bytes.charCodeAt(i) / 255;
  } else {
    for (const [layer, head, query, key, weight] of record.links)
      values[(layer * heads + head) * triangle + query * (query + 1) / 2 + key] = weight;
  }
  return (layer, head, query, key) =>
    key > query ? 0 : values[(layer * heads + head) * triangle + query * (query + 1) / 2 + key];
}

function attentionSection() {
  const { layers, heads, prompts } = data.attention;
  const state = { prompt: 0, layer: 0, head: 0, token: 0 };
  const names = Object.keys(prompts[0].models);
  let weights = {};
  const layerSelect = select("Layer", [...Array(layers).keys()].map(String), (i) => { state.layer = i; draw(); });
  const headSelect = select("Head", [...Array(heads).keys()].map(String), (i) => { state.head = i; draw(); });
  const panels = names.map((name) => {
    const overview = element("canvas", { tabindex: 0, role: "img", "data-model": name, class: "overview",
      "aria-label": `All heads of the ${name} model, a row for each layer; arrow keys pick one` });
    const matrix = element("canvas", { role: "img", class: "matrix", "data-model": name });
    const says = element("output", {}), strip = element("div", { class: "tokens" });
    const table = element("div", { class: "scroll" }), count = element("p", { class: "soft" });
    return { name, overview, matrix, says, strip, table, count };
  });
  const figures = panels.map((panel) => element("figure", {},
    element("h3", {}, panel.name === "dense" ? "Dense ○" : "Sparse ●"), panel.count, panel.overview));
  const details = panels.map((panel) => element("figure", { class: "detail" },
    element("h3", {}, panel.name === "dense" ? "Dense ○" : "Sparse ●"), panel.matrix, panel.says, panel.strip, panel.table));
  section("attention", "Attention",
    element("p", {}, "Each small square is one head, rows are layers; in a square rows are the tokens that read, columns those they read. Pick a head here or below; point at a token, or move to it with Tab and the arrow keys."),
    element("div", { class: "controls" },
      select("Prompt", prompts.map((prompt) => `${prompt.note}: ${prompt.tokens.join("").slice(0, 60)}`),
        (i) => { state.prompt = i; state.token = prompts[i].tokens.length - 1; load(); }), layerSelect, headSelect),
    element("div", { class: "pair" }, figures),
    element("h3", { id: "picked" }, ""),
    element("p", { class: "soft" }, "Shade: how much the picked token reads this one. Line below: how much this one reads the picked token."),
    element("div", { class: "pair" }, details));

  function load() {
    const prompt = prompts[state.prompt];
    weights = Object.fromEntries(names.map((name) => [name, weightsOf(prompt, prompt.models[name])]));
    state.token = Math.min(state.token, prompt.tokens.length - 1);
    for (const panel of panels) {
      panel.strip.replaceChildren(...prompt.tokens.map((text, place) => element("button", {
        class: "token", type: "button", "data-place": place, title: `token ${place}`,
        onmouseenter: () => pick(place), onfocus: () => pick(place), onclick: () => pick(place),
        onkeydown: (event) => {
          const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
          const next = step && panel.strip.children[place + step];
          if (next) { next.focus(); event.preventDefault(); }
        } }, token(text))));
      const allowed = layers * heads * prompt.tokens.length * (prompt.tokens.length + 1) / 2;
      const open = prompt.models[panel.name].open;
      panel.count.textContent = `${open.toLocaleString("en")} of ${allowed.toLocaleString("en")} links carry something (${number(100 * open / allowed, 2)} %)`;
    }
    draw();
  }
  function pick(place) { state.token = place; detail(); }
  function go(layer, head) {
    state.layer = Math.max(0, Math.min(layers - 1, layer));
    state.head = Math.max(0, Math.min(heads - 1, head));
    draw();
  }
  function overview(panel) {
    const canvas = panel.overview, tokens = prompts[state.prompt].tokens.length;
    const room = canvas.parentElement.clientWidth - 24;
    const cell = Math.max(10, Math.min(heads > 6 ? 46 : 84, Math.floor(room / heads)));
    size(canvas, cell * heads + 24, cell * layers);
    const context = canvas.getContext("2d"), step = (cell - 3) / tokens;
    context.font = "10px system-ui"; context.textBaseline = "middle";
    for (let layer = 0; layer < layers; layer++) {
      context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--soft");
      context.fillText(String(layer), 2, layer * cell + cell / 2);
      for (let head = 0; head < heads; head++) {
        const left = 24 + head * cell, top = layer * cell;
        context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--line");
        context.lineWidth = 1; context.strokeRect(left + .5, top + .5, cell - 2, cell - 2);
        for (let query = 0; query < tokens; query++) for (let key = 0; key <= query; key++) {
          const weight = weights[panel.name](layer, head, query, key);
          if (weight < 0.02) continue;
          context.fillStyle = ink(panel.name, Math.min(1, 0.12 + 0.88 * weight));
          context.fillRect(left + 1 + key * step, top + 1 + query * step, Math.max(1.2, step), Math.max(1.2, step));
        }
        if (layer === state.layer && head === state.head) {
          context.strokeStyle = ink("--mark"); context.lineWidth = 3;
          context.strokeRect(left + 1, top + 1, cell - 3, cell - 3);
        }
      }
    }
    canvas.onclick = (event) => {
      const [x, y] = spot(event);
      go(Math.floor(y / cell), Math.floor((x - 24) / cell));
    };
    canvas.onkeydown = (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (move) { go(state.layer + move[0], state.head + move[1]); event.preventDefault(); }
    };
  }
  function matrix(panel) {
    const canvas = panel.matrix, tokens = prompts[state.prompt].tokens;
    const cell = Math.max(4, Math.min(26, Math.floor((Math.min(canvas.parentElement.clientWidth, 560) - 80) / tokens.length)));
    const names = cell >= 9 ? 76 : 0;  // room for the tokens' names along the diagonal
    size(canvas, cell * tokens.length + 1 + names, cell * tokens.length + 1);
    const context = canvas.getContext("2d"), get = weights[panel.name];
    context.font = `${Math.min(12, cell)}px ui-monospace, monospace`; context.textBaseline = "middle";
    if (names) tokens.forEach((text, place) => {
      context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--soft");
      context.fillText("\u2068" + shown(text).slice(0, 10) + "\u2069", (place + 1) * cell + 4, place * cell + cell / 2);
    });
    for (let query = 0; query < tokens.length; query++) for (let key = 0; key <= query; key++) {
      const weight = get(state.layer, state.head, query, key);
      context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--line");
      context.strokeRect(key * cell + .5, query * cell + .5, cell, cell);
      if (weight > 0) {
        context.fillStyle = ink(panel.name, 0.1 + 0.9 * weight);
        context.fillRect(key * cell + 1, query * cell + 1, cell - 1, cell - 1);
      }
    }
    canvas.setAttribute("aria-label", `Attention of layer ${state.layer} head ${state.head}, ${panel.name}; the numbers stand below`);
    canvas.onmousemove = (event) => {
      const [x, y] = spot(event), query = Math.floor(y / cell), key = Math.floor(x / cell);
      if (query < 0 || key < 0 || query >= tokens.length || key > query) return;
      panel.says.replaceChildren(token(tokens[query]), ` (${query}) reads `, token(tokens[key]), ` (${key}): ${number(get(state.layer, state.head, query, key))}`);
    };
  }
  function detail() {
    const prompt = prompts[state.prompt];
    for (const panel of panels) {
      const get = (query, key) => weights[panel.name](state.layer, state.head, query, key);
      [...panel.strip.children].forEach((button, place) => {
        const reads = get(state.token, place), read = get(place, state.token);
        button.style.background = reads > 0 ? ink(panel.name, 0.1 + 0.75 * reads) : "transparent";
        button.style.borderBottomColor = place !== state.token && read > 0 ? ink("--third", 0.2 + 0.8 * read) : "";
        button.setAttribute("aria-pressed", place === state.token);
      });
      const rows = (pairs) => pairs.filter(([, weight]) => weight >= 0.001).sort((a, b) => b[1] - a[1]).slice(0, 6)
        .flatMap(([place, weight]) => [token(prompt.tokens[place]), ` ${place}: ${number(weight)}   `]);
      const all = [...prompt.tokens.keys()];
      const likely = prompt.models[panel.name].next[state.token];
      const line = (name, content) => element("tr", {}, element("th", { scope: "row" }, name),
        element("td", { style: "text-align:left;white-space:normal" }, content.length ? content : "nothing"));
      panel.table.replaceChildren(element("table", {}, element("tbody", {},
        line("reads", rows(all.map((place) => [place, get(state.token, place)]))),
        line("is read by", rows(all.filter((place) => place > state.token).map((place) => [place, get(place, state.token)]))),
        line("then says", likely.flatMap(([text, share]) => [token(text), ` ${number(share)}   `])))));
    }
  }
  function draw() {
    layerSelect.querySelector("select").selectedIndex = state.layer;
    headSelect.querySelector("select").selectedIndex = state.head;
    document.getElementById("picked").textContent = `Layer ${state.layer}, head ${state.head}`;
    for (const panel of panels) { overview(panel); matrix(panel); }
    detail();
  }
  state.token = prompts[0].tokens.length - 1;
  load();
  redraws.push(draw);
}
function size(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  canvas.style.width = width + "px"; canvas.style.height = "auto";
  canvas.getContext("2d").scale(ratio, ratio);
}
// Where the mouse is in a canvas, in the units it was drawn in: a narrow window shows it smaller.
function spot(event) {
  const canvas = event.currentTarget, box = canvas.getBoundingClientRect();
  const scale = parseFloat(canvas.style.width) / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

// Tokens along x, layers upwards; a link goes from what is read to what reads it, one layer up.
function layered(tokens, layers, links, color, picked = [], label = (text) => shown(text).slice(0, 12)) {
  const wide = Math.max(360, tokens.length * 46), rise = Math.max(14, Math.min(70, 420 / layers));
  // Slanted labels reach to the left of their token: the first ones must not leave the picture.
  const inset = Math.max(36, ...tokens.map((text, place) => 4.6 * label(text).length - (place + .5) * (wide - 40) / tokens.length));
  const x = (place) => inset + (place + .5) * (wide - inset - 4) / tokens.length, y = (level) => 12 + (layers - level) * rise;
  const most = largest(links.map((link) => Math.abs(link[4] ?? 1)), 1e-9);
  const svg = drawn("svg", { viewBox: `0 0 ${wide} ${layers * rise + 34 + 5.4 * Math.max(...tokens.map((text) => label(text).length))}`, role: "img", style: `min-width:${Math.min(wide, 640)}px` });
  for (let level = 0; level <= layers; level += layers > 12 ? 5 : 1)
    svg.append(drawn("line", { x1: 32, x2: wide, y1: y(level), y2: y(level), class: "grid" }),
      drawn("text", { x: 2, y: y(level) + 4, class: "soft" }, level ? String(level - 1) : "in"));
  tokens.forEach((text, place) => {
    const name = drawn("text", { x: 0, y: 0, "text-anchor": "end", direction: "ltr", style: "unicode-bidi:isolate",
      transform: `translate(${x(place) + 4},${y(0) + 12}) rotate(-50)` }, label(text));
    svg.append(name);
  });
  links.forEach(([layer, head, query, key, score = 1], place) => {
    const width = 0.6 + 5 * Math.abs(score) / most, chosen = picked.includes(place);
    const path = drawn("path", {
      d: `M${x(key)},${y(layer)} C${x(key)},${y(layer + .5)} ${x(query)},${y(layer + .5)} ${x(query)},${y(layer + 1)}`,
      fill: "none", stroke: chosen ? ink("--mark") : ink(color, picked.length ? .35 : .75),
      "stroke-width": chosen ? Math.max(4, width) : width, "stroke-dasharray": score > 0 && links[0].length > 4 ? "5 3" : "" },
      drawn("title", {}, `layer ${layer} head ${head}: ${shown(tokens[query])} (${query}) reads ${shown(tokens[key])} (${key})`));
    svg.append(path);
    if (chosen) svg.append(path);
  });
  return element("div", { class: "scroll" }, svg);
}

function circuitSection(name, links) {
  const layers = data.layers, changes = links.ablation === "zero"
    ? ["about how much the metric changes when the link carries nothing", "carrying nothing"]
    : ["about how much the metric changes when the link carries the corrupted run's value", "patched"];
  const made = section("circuit-" + name, `Circuit of ${name}`,
    element("p", {}, `The attention links that explain 90 % of the task's metric (mean over the prompts), on one prompt; corruption: ${links.corruption ?? "unknown"}. Width: ${changes[0]}; whole lines support the answer, dashed ones work against it.`),
    element("p", {}, "Answer: ", token(links.answer)));
  const pair = element("div", { class: "pair" });
  made.append(pair);
  for (const [model, { size, links: found }] of Object.entries(links.models)) {
    const strongest = [...found].sort((a, b) => Math.abs(b[4]) - Math.abs(a[4])).slice(0, MOST_DRAWN);
    const order = strongest.sort((a, b) => a[0] - b[0] || a[2] - b[2]);
    const count = found.length > order.length
      ? `the ${order.length.toLocaleString("en")} strongest of ${found.length.toLocaleString("en")} links on this prompt are shown`
      : `${order.length.toLocaleString("en")} links on this prompt`;
    let place = -1;
    const picture = element("div", {}), says = element("output", {});
    const draw = () => {
      picture.replaceChildren(layered(links.tokens, layers, order, model, place < 0 ? [] : [place]));
      if (place < 0) return says.replaceChildren(count + (size ? ` (best ${size.toLocaleString("en")}, less those cut off)` : ""));
      const [layer, head, query, key, score] = order[place];
      says.replaceChildren(`${place + 1} of ${order.length}: layer ${layer} head ${head}: `, token(links.tokens[query]), ` (${query}) reads `,
        token(links.tokens[key]), ` (${key}); ${changes[1]}, the metric changes by ${number(score, 4)}`);
    };
    const step = (by) => () => { place = order.length ? (place + by + order.length + (place < 0 && by < 0 ? 1 : 0)) % order.length : -1; draw(); };
    pair.append(element("figure", {}, element("h3", {}, model === "dense" ? "Dense ○" : "Sparse ●"),
      element("div", { class: "controls" }, element("button", { type: "button", onclick: step(-1) }, "← previous link"),
        element("button", { type: "button", onclick: step(1) }, "next link →"),
        element("button", { type: "button", onclick: () => { place = -1; draw(); } }, "all")), says, picture,
      numbers(["layer", "head", "reads", "is read", "score"], order.map(([layer, head, query, key, score]) => [String(layer), String(head), `${query} ${shown(links.tokens[query])}`, `${key} ${shown(links.tokens[key])}`, score]))));
    draw(); redraws.push(draw);
  }
}

function findingsSection() {
  const { title, sentences, positions } = data.findings;
  let place = 0;
  const picture = element("div", {}), evidence = element("div", { class: "scroll" });
  const all = [...new Map(sentences.flatMap((each) => each.links).map((link) => [link.join(), link])).values()];
  const buttons = sentences.map((each, index) => element("li", {},
    element("button", { type: "button", onclick: () => { place = index; draw(); } }, each.text)));
  const draw = () => {
    buttons.forEach((item, index) => item.firstChild.setAttribute("aria-current", index === place));
    const wanted = new Set(sentences[place].links.map((link) => link.join()));
    const picked = all.map((link, index) => wanted.has(link.join()) ? index : -1).filter((index) => index >= 0);
    picture.replaceChildren(layered(positions, data.layers, all, "sparse",
      picked.length === all.length ? [] : picked, (text) => text));
    evidence.replaceChildren(element("table", {}, element("tbody", {}, Object.entries(sentences[place].evidence).map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, typeof value === "number" ? number(value, 4) : String(value)))))));
  };
  const step = (by) => () => { place = (place + by + sentences.length) % sentences.length; draw(); };
  section("findings", "What the links do", element("p", {}, title), element("div", { class: "pair" },
    element("div", {}, element("div", { class: "controls" }, element("button", { type: "button", onclick: step(-1) }, "← previous"),
      element("button", { type: "button", onclick: step(1) }, "next →")), element("ol", { class: "sentences" }, buttons)),
    element("div", {}, picture, element("h3", {}, "Measured"), evidence)));
  draw(); redraws.push(draw);
}

// A chart: series of points with lines and markers that differ in more than colour; the nearest point is read out.
const DASHES = ["", "7 4", "2 3", "9 3 2 3"], TINTS = ["--dense", "--sparse", "--third", "--mark"];
function chart(title, xName, yName, series, options = {}) {
  const wide = 560, high = 300, left = 62, bottom = 40, scale = { x: options.xLog ? Math.log10 : (v) => v, y: options.yLog ? Math.log10 : (v) => v };
  series = series.map((one) => ({ ...one, points: one.points.filter(([x, y]) => x !== null && y !== null && y !== undefined && (!options.xLog || x > 0) && (!options.yLog || y > 0)) })).filter((one) => one.points.length);
  if (!series.length) return null;
  const flat = series.flatMap((one) => one.points), limits = (index, log) => {
    const values = flat.map((point) => log(point[index]));
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { low -= .5; high += .5; }
    const margin = .04 * (high - low);
    return [low - margin, high + margin];
  };
  const [x0, x1] = limits(0, scale.x), [y0, y1] = limits(1, scale.y);
  const px = (v) => left + (scale.x(v) - x0) / (x1 - x0) * (wide - left - 10);
  const py = (v) => high - bottom - (scale.y(v) - y0) / (y1 - y0) * (high - bottom - 12);
  const says = element("output", {}, ""), holder = element("div", {});
  const ticks = (low, high, log) => {
    if (log && high - low > 1) return Array.from({ length: Math.floor(high) - Math.ceil(low) + 1 }, (_, i) => 10 ** (Math.ceil(low) + i));
    const raw = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((s) => s * unit >= raw) * unit;
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(log ? 10 ** value : value);
    return found;
  };
  const draw = () => {
    const svg = drawn("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `${title}; the numbers stand below` });
    for (const value of ticks(y0, y1, options.yLog)) svg.append(drawn("line", { x1: left, x2: wide - 8, y1: py(value), y2: py(value), class: "grid" }),
      drawn("text", { x: left - 5, y: py(value) + 4, "text-anchor": "end", class: "soft" }, String(+value.toPrecision(3))));
    for (const value of ticks(x0, x1, options.xLog)) svg.append(drawn("text", { x: px(value), y: high - bottom + 15, "text-anchor": "middle", class: "soft" }, (+value.toPrecision(3)).toLocaleString("en")));
    svg.append(drawn("text", { x: (wide + left) / 2, y: high - 6, "text-anchor": "middle" }, xName),
      drawn("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(11,${(high - bottom) / 2}) rotate(-90)` }, yName));
    series.forEach((one, index) => {
      const color = ink(one.tint || TINTS[index % 4]);
      if (one.points.length > 1 && !one.bare) svg.append(drawn("path", { d: "M" + one.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join("L"), fill: "none", stroke: color, "stroke-width": 1.8, "stroke-dasharray": one.dash ?? DASHES[index % 4] }));
      if (one.points.length <= 60) for (const [x, y] of one.points) svg.append(marker(index, px(x), py(y), color));
    });
    svg.addEventListener("mousemove", (event) => {
      const box = svg.getBoundingClientRect(), mx = (event.clientX - box.left) * wide / box.width, my = (event.clientY - box.top) * high / box.height;
      let best = null;
      for (const one of series) for (const point of one.points) {
        const distance = Math.hypot(px(point[0]) - mx, py(point[1]) - my);
        if (!best || distance < best.distance) best = { distance, one, point };
      }
      says.textContent = `${best.one.name}: ${xName} ${number(best.point[0], 4)}, ${yName} ${number(best.point[1], 4)}`;
    });
    const legend = element("div", { class: "legend" }, series.map((one, index) => {
      const color = ink(one.tint || TINTS[index % 4]);
      return element("span", {}, drawn("svg", { viewBox: "0 0 30 10" }, drawn("line", { x1: 0, x2: 30, y1: 5, y2: 5, stroke: color, "stroke-width": 2, "stroke-dasharray": one.dash ?? DASHES[index % 4] }), marker(index, 15, 5, color)), one.name);
    }));
    holder.replaceChildren(legend, svg);
  };
  draw(); redraws.push(draw);
  return element("figure", {}, element("h3", {}, title), holder, says,
    numbers(["series", xName, yName], series.flatMap((one) => one.points.map(([x, y]) => [one.name, x, y]))));
}
function marker(kind, x, y, color) {
  if (kind % 4 === 0) return drawn("circle", { cx: x, cy: y, r: 3.4, fill: "none", stroke: color, "stroke-width": 1.6 });
  if (kind % 4 === 1) return drawn("circle", { cx: x, cy: y, r: 3.4, fill: color });
  if (kind % 4 === 2) return drawn("path", { d: `M${x},${y - 4}l4,7h-8z`, fill: color });
  return drawn("rect", { x: x - 3, y: y - 3, width: 6, height: 6, fill: color });
}

function heatSection(values) {
  const holder = element("div", { class: "scroll" }), says = element("output", {});
  const draw = () => {
    const cell = 18, svg = drawn("svg", { viewBox: `0 0 ${values[0].length * cell + 34} ${values.length * cell + 26}`, role: "img", style: `max-width:${values[0].length * cell * 2 + 60}px`, "aria-label": "Open fraction by layer and head; the numbers stand below" });
    values.forEach((row, layer) => {
      svg.append(drawn("text", { x: 28, y: layer * cell + 13, "text-anchor": "end", class: "soft" }, String(layer)));
      row.forEach((value, head) => {
        const shade = value > 0 ? Math.max(.06, 1 + Math.log10(value) / 4) : 0;
        const box = drawn("rect", { x: 32 + head * cell, y: layer * cell, width: cell - 1, height: cell - 1, fill: ink("sparse", shade), class: "grid" });
        box.addEventListener("mouseenter", () => { says.textContent = `layer ${layer}, head ${head}: ${number(100 * value, 3)} % open`; });
        svg.append(box);
      });
    });
    values[0].forEach((_, head) => svg.append(drawn("text", { x: 32 + head * cell + 8, y: values.length * cell + 14, "text-anchor": "middle", class: "soft" }, String(head))));
    holder.replaceChildren(svg);
  };
  draw(); redraws.push(draw);
  section("heads", "Open links by layer and head",
    element("p", { class: "soft" }, "Rows are layers, columns heads; the shade is logarithmic, from 0.01 % open to 100 %."), says, holder,
    numbers(["layer", ...values[0].map((_, head) => `head ${head}`)], values.map((row, layer) => [String(layer), ...row])));
}

if (Object.keys(data.summary).length) summarySection();
if (data.findings) findingsSection();
if (data.attention) attentionSection();
for (const [name, links] of Object.entries(data.links)) circuitSection(name, links);
for (const { id, title, figures } of data.charts) {
  const made = figures.map((one) => chart(one.title, one.x, one.y, one.series, one.options)).filter((one) => one);
  if (made.length) section(id, title, element("div", { class: "charts" }, made));
}
if (data.heads) heatSection(data.heads);
