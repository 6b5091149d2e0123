"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const MOST_DRAWN = 2000;  // links in one picture and its table; of more, the strongest
const COLOR = { dense: "--dense", sparse: "--sparse" };
const SVG = "http://www.w3.org/2000/svg";

// Text enters the page through textContent alone.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  // One at a time: as arguments of one call they would be too many.
  for (const child of children.flat()) if (child !== null && child !== undefined) made.append(child);
  return made;
}
function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.flat());
  return made;
}
const ink = (name, alpha = 1) =>
  `rgba(${getComputedStyle(document.documentElement).getPropertyValue(COLOR[name] || name).trim()}, ${alpha})`;
const shown = (text) => text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
const token = (text) => element("bdi", {}, shown(text));
const number = (value, digits = 3) =>
  value === null || value === undefined ? "–"
    : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
    : Number.isInteger(value) ? String(value)
    : Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(2) : value.toFixed(digits);

const largest = (values, least) => values.reduce((most, value) => Math.max(most, value), least);

const redraws = [];
function section(id, title, ...children) {
  const made = element("section", { id, "aria-labelledby": id + "-title" },
    element("h2", { id: id + "-title" }, title), ...children);
  main.append(made);
  document.getElementById("contents").append(element("a", { href: "#" + id }, title));
  return made;
}
function numbers(columns, rows) {
  return element("details", {}, element("summary", {}, "Numbers"), element("div", { class: "scroll tall" },
    element("table", {},
      element("thead", {}, element("tr", {}, columns.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, rows.map((row) => element("tr", {},
        row.map((cell) => element("td", {}, typeof cell === "number" ? number(cell, 4) : cell ?? "–"))))))));
}
function select(label, options, change) {
  const made = element("select", { onchange: () => change(made.selectedIndex) },
    options.map((text) => element("option", {}, text)));
  return element("label", {}, label, made);
}

const THEMES = ["system", "light", "dark"];
let theme = 0;
const redraw = () => redraws.forEach((draw) => draw());
document.getElementById("theme").addEventListener("click", (event) => {
  theme = (theme + 1) % 3;
  if (theme) document.documentElement.dataset.theme = THEMES[theme]; else delete document.documentElement.dataset.theme;
  event.target.textContent = `Theme: ${THEMES[theme]}`;
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
document.getElementById("name").textContent = data.name;
document.title = `gossamer: ${data.name}`;
