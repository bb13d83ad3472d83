"use strict";
// The tables: all rows, sorted by a click on a heading and filtered; and differences paired by prompt.

(() => {
  const { columns, rows } = DATA.table;
  const MOST_CHOICES = 60;
  const state = { sort: null, down: false, words: "", chosen: new Map() };

  function cellText(value, shown) {
    if (value === null || value === undefined) return "–";
    if (shown === "text") return String(value);
    return shown === "bytes" ? sized(value) : shownNumber(value, Number(shown));
  }

  // Numbers by value, texts with their numbers in order; what is missing comes last either way.
  function compared(a, b) {
    const missing = (a === null) - (b === null);
    if (missing || a === null) return missing;
    const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return state.down ? -order : order;
  }

  function filtered() {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const texts = columns.map((column, index) => (column.shown === "text" ? index : -1)).filter((index) => index >= 0);
    return rows.filter((row) => {
      for (const [index, value] of state.chosen) if (String(row[index]) !== value) return false;
      const text = texts.map((index) => row[index] ?? "").join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
  }

  function draw() {
    const shown = filtered();
    if (state.sort !== null) shown.sort((a, b) => compared(a[state.sort], b[state.sort]));
    const policy = columns.findIndex((column) => column.key === "policy");
    byId("rows").tBodies[0].replaceChildren(...shown.map((row) =>
      element("tr", { class: row[policy] === DATA.full ? "full" : null }, ...row.map((value, index) =>
        element("td", { class: columns[index].shown === "text" ? "text" : null }, cellText(value, columns[index].shown))))));
    byId("count").textContent = `${shown.length} of ${rows.length} rows`;
    byId("rows").querySelectorAll("th").forEach((heading, index) => {
      const sorted = state.down ? "descending" : "ascending";
      heading.setAttribute("aria-sort", index === state.sort ? sorted : "none");
    });
  }

  function sortBy(index) {
    const number = columns[index].shown !== "text";
    state.down = state.sort === index ? !state.down : number; // numbers begin with the largest
    state.sort = index;
    draw();
  }

  function makeTable() {
    const headings = columns.map((column, index) =>
      element("th", { scope: "col", class: column.shown === "text" ? "text" : null, title: column.about || null },
        element("button", { type: "button", onclick: () => sortBy(index) }, column.label)));
    byId("rows").append(element("thead", {}, element("tr", {}, ...headings)), element("tbody"));
    const search = element("input", { type: "search", id: "search", placeholder: "words to find" });
    search.addEventListener("input", () => { state.words = search.value; draw(); });
    byId("filters").append(element("label", {}, "find", search));
    columns.forEach((column, index) => {
      const values = unique(rows.map((row) => row[index])).filter((value) => value !== null);
      const words = column.shown === "text" || column.key === "length";
      if (!words || values.length < 2 || values.length > MOST_CHOICES) return;
      const options = [["", "all"], ...values.map((value) => [String(value), cellText(value, column.shown)])];
      const made = choice(column.label, options, (value) => {
        if (value) state.chosen.set(index, value);
        else state.chosen.delete(index);
        draw();
      });
      made.select.id = `filter-${column.key}`;
      byId("filters").append(made.label);
    });
    draw();
  }

  // Differences: every policy minus the chosen one.
  function drawPairs(panel, minus) {
    const found = new Map();
    for (const [first, second, budget, mean, stderr, n] of panel.cells) {
      if (second === minus) found.set(`${first} ${budget}`, [mean, stderr, n]);
      if (first === minus) found.set(`${second} ${budget}`, [-mean, stderr, n]);
    }
    const heading = (text, kind) => element("th", { scope: "col", class: kind }, text);
    const lines = panel.policies.map((name, index) => [name, index]).filter(([, index]) => index !== minus)
      .filter(([, index]) => panel.budgets.some((_, budget) => found.has(`${index} ${budget}`)))
      .map(([name, index]) => element("tr", {}, element("th", { scope: "row", class: "text" }, name),
        ...panel.budgets.map((_, budget) => pairCell(found.get(`${index} ${budget}`), panel.digits))));
    byId("pairs").replaceChildren(
      element("thead", {}, element("tr", {}, heading("policy", "text"), ...panel.budgets.map((b) => heading(b)))),
      element("tbody", {}, ...lines));
    const what = panel.value === "score" ? "Score" : "KL to the full cache (smaller is better)";
    byId("difference-about").textContent = `${what} of every policy minus that of ${panel.policies[minus]}, on the same `
      + "prompts ± standard error (number of prompts). Bold: more than two standard errors.";
  }

  function pairCell(cell, digits) {
    if (!cell) return element("td", {}, "–");
    const [mean, stderr, n] = cell;
    const sign = mean > 0 ? "+" : "";
    const spread = stderr === null ? "" : ` ± ${shownNumber(stderr, digits)}`;
    const clear = stderr !== null && Math.abs(mean) > 2 * stderr;
    return element("td", { class: clear ? "clear" : null }, sign + shownNumber(mean, digits),
      element("span", { class: "spread" }, `${spread} (${n})`));
  }

  function makePairs() {
    const panels = DATA.differences;
    const state = { panel: 0, minus: 0 };
    let minus;
    const redraw = () => drawPairs(panels[state.panel], state.minus);
    const fill = () => {
      const names = panels[state.panel].policies;
      const before = minus?.select.selectedOptions[0]?.textContent;
      const made = choice("minus", names.map((name, index) => [index, name]), (value) => {
        state.minus = Number(value);
        redraw();
      });
      made.select.id = "minus";
      state.minus = Math.max(0, names.indexOf(before ?? DATA.full));
      made.select.value = state.minus;
      if (minus) minus.label.replaceWith(made.label);
      else byId("difference-controls").append(made.label);
      minus = made;
    };
    if (panels.length > 1) {
      const made = choice("of", panels.map((panel, index) => [index, panel.title]), (value) => {
        state.panel = Number(value);
        fill();
        redraw();
      });
      byId("difference-controls").append(made.label);
    }
    fill();
    redraw();
  }

  document.addEventListener("DOMContentLoaded", () => {
    if (rows.length) makeTable();
    if (DATA.differences.length) makePairs();
  });
})();
