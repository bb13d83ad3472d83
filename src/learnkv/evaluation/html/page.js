"use strict";
// Shared by all parts: the data, elements, selects, and tabs. Texts of the data only ever become text nodes.

const DATA = JSON.parse(document.getElementById("data").textContent);
const HASH = "#tab=";  // no element has this id: the browser must not scroll to it
const TABS = {};  // what to do when a tab is shown, by the id of its section

const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A select with a label; `options` are texts or [value, text]. `changed` gets the chosen value.
function choice(label, options, changed, chosen) {
  const select = element("select", { onchange: () => changed(select.value) });
  for (const option of options) {
    const [value, text] = Array.isArray(option) ? option : [option, option];
    select.append(element("option", { value }, text));
  }
  if (chosen !== undefined) select.value = chosen;
  return { select, label: element("label", {}, label, select) };
}

const unique = (values) => [...new Set(values)];

function sized(bytes) {
  for (const [factor, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (bytes >= factor) return `${Number((bytes / factor).toPrecision(3))} ${unit}`;
  }
  return `${Math.round(bytes)} B`;
}

function shownNumber(value, digits) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

async function inflated(base64) {
  const packed = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function showTab(id, focus = false) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.dataset.section === id;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    byId(tab.dataset.section).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  history.replaceState(null, "", HASH + id);
  TABS[id]?.();
}

function moveTab(event) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const place = tabs.indexOf(event.target);
  const targets = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 };
  if (!(event.key in targets)) return;
  event.preventDefault();
  showTab(tabs.at(targets[event.key] % tabs.length).dataset.section, true);
}

// A tab for every section that has something to show.
function makeTabs(empty) {
  const sections = [...document.querySelectorAll("[data-tab]")].filter((section) => !empty.includes(section.id));
  for (const section of sections) {
    const id = `tab-${section.id}`;
    section.setAttribute("aria-labelledby", id);
    const attributes = { id, role: "tab", type: "button", "data-section": section.id, "aria-controls": section.id };
    const events = { onclick: () => showTab(section.id), onkeydown: moveTab };
    byId("tabs").append(element("button", { ...attributes, ...events }, section.dataset.tab));
  }
  const ids = sections.map((section) => section.id);
  const wanted = () => (location.hash.startsWith(HASH) ? location.hash.slice(HASH.length) : "");
  for (const id of empty) byId(id).hidden = true;
  const first = DATA.table.rows.length || !ids.includes("samples") ? ids[0] : "samples";
  showTab(ids.includes(wanted()) ? wanted() : first);
  window.addEventListener("hashchange", () => ids.includes(wanted()) && showTab(wanted()));
}

function describe() {
  const { table } = DATA;
  const column = (key) => table.columns.findIndex((found) => found.key === key);
  const values = (key) => unique(table.rows.map((row) => row[column(key)]));
  const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
  const parts = table.rows.length
    ? [counted(values("policy").filter((name) => name !== DATA.full).length, "policy").replace("policys", "policies"),
       counted(values("task").length, "task"), counted(table.rows.length, "row")]
    : [];
  byId("summary").textContent = [`model ${DATA.model}`, ...parts, counted(DATA.samples.length, "sample") + " to look into"].join(" · ");
  byId("notes").append(...DATA.notes.map((note) => element("li", {}, note)));
  const facts = Object.entries({ model: DATA.model, ...DATA.environment });
  byId("environment").append(element("tbody", {}, ...facts.map(([key, value]) =>
    element("tr", {}, element("th", { scope: "row" }, key), element("td", {}, String(value))))));
  byId("command").textContent = DATA.command;
  byId("config").textContent = DATA.config;
  byId("command-part").hidden = !DATA.command;
  byId("config-part").hidden = !DATA.config;
}

document.addEventListener("DOMContentLoaded", () => {
  describe();
  const empty = [];
  if (!DATA.charts.length && !DATA.notes.length) empty.push("overview");
  if (!DATA.table.rows.length) empty.push("tasks");
  if (!DATA.needles.length && !DATA.budgets.length) empty.push("maps");
  if (!DATA.differences.length) empty.push("differences");
  if (!DATA.samples.length) empty.push("samples");
  makeTabs(empty);
});
