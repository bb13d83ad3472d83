"use strict";
// Charts: plotly is inflated once a tab with charts is shown; colours follow the browser's light or dark scheme.

(() => {
  const drawn = new Map();  // element of a chart -> its figure, and what its looks depended on
  const waiting = new Map();  // figures of tabs that have not been shown
  const NARROW = 700;
  const RED_TO_GREEN = [[0, "#b2182b"], [0.5, "#fde08a"], [1, "#1a8f4c"]];
  let loading = null;

  async function load() {
    if (!("DecompressionStream" in window)) throw new Error("this browser is too old to draw charts");
    const text = new TextDecoder().decode(await inflated(byId("plotly").textContent.trim()));
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const looks = () => `${colour("--text")} ${window.innerWidth}`;

  function themed(figure) {
    const text = colour("--text");
    const { data, layout } = JSON.parse(JSON.stringify(figure).replaceAll(DATA.foreground, text));
    const axis = (own) => ({ gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
      automargin: true, ...own });
    const narrow = window.innerWidth < NARROW;
    const legend = narrow ? { orientation: "h", y: -0.25, yanchor: "top" } : { orientation: "v" };
    return { data, layout: { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text, size: 12 }, margin: { l: 55, r: 10, t: 16, b: 45 }, legend, autosize: true,
      hoverlabel: { bgcolor: colour("--raised"), font: { color: text } },
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) } };
  }

  async function draw(target, figure) {
    loading ??= load();
    try {
      await loading;
    } catch (error) {
      target.textContent = `No chart: ${error.message}. The tables have all numbers.`;
      return;
    }
    const { data, layout } = themed(figure);
    await Plotly.react(target, data, layout, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] });
    drawn.set(target, { figure, looks: looks() });
  }

  function redrawAll() {
    for (const [target, { figure, looks: before }] of drawn) {
      if (!target.isConnected) drawn.delete(target);
      else if (target.offsetParent && before !== looks()) draw(target, figure);
    }
  }

  // Charts of a tab are drawn when it is shown: a hidden element has no size.
  function later(tab, task) {
    waiting.set(tab, [...(waiting.get(tab) ?? []), task]);
    TABS[tab] = () => {
      const tasks = waiting.get(tab) ?? [];
      waiting.set(tab, []);
      tasks.forEach((run) => run());
      redrawAll();
    };
  }

  function chart(title, className) {
    const target = element("div", { class: className, role: "img", "aria-label": title });
    return { target, figure: element("figure", {}, element("figcaption", {}, title), target) };
  }

  function makePareto() {
    for (const { title, figure } of DATA.charts) {
      const target = element("div", { class: "chart", role: "img", "aria-label": title });
      byId("pareto").append(element("p", { class: "chart-title" }, title), target);
      const tall = { ...figure, layout: { ...figure.layout, height: 460 + (window.innerWidth < NARROW ? 14 * figure.data.length : 0) } };
      later("overview", () => draw(target, tall));
    }
  }

  function heatMap(z, x, y, titles, options) {
    const labels = x.length * y.length <= 200;
    return {
      data: [{ type: "heatmap", z, x, y, texttemplate: labels ? options.template : undefined, colorscale: options.scale,
        zmin: options.low, zmax: options.high, hoverongaps: false, xgap: 1, ygap: 1, hovertemplate: options.hover,
        colorbar: { thickness: 10, title: { text: options.bar, side: "right" } } }],
      layout: { xaxis: { title: { text: titles[0] }, type: "category", showgrid: false },
        yaxis: { title: { text: titles[1] }, type: "category", autorange: "reversed", showgrid: false },
        height: options.height },
    };
  }

  function drawNeedles(part, budget) {
    const shown = part.maps.filter((map) => map.policy === DATA.full || map.budget === budget);
    const parts = shown.map((map) => {
      const title = map.policy === DATA.full ? "full cache" : `${map.policy}, ${map.budget}`;
      const made = chart(title, "needle");
      const figure = heatMap(map.scores, map.lengths.map(String), map.depths.map((depth) => `${depth} %`), ["tokens", "depth"],
        { template: "%{z:.0f}", scale: RED_TO_GREEN, low: 0, high: 100, bar: "score", height: 110 + 32 * Math.max(4, map.depths.length),
          hover: "%{x} tokens, depth %{y}: %{z:.1f}<extra></extra>" });
      return { ...made, drawing: figure };
    });
    byId("needles").replaceChildren(...parts.map((part) => part.figure));
    parts.forEach((part) => draw(part.target, part.drawing));
  }

  function makeNeedles() {
    byId("needle-part").hidden = !DATA.needles.length;
    if (!DATA.needles.length) return;
    const state = { part: 0, budget: null };
    let budgets = null;
    const redraw = () => drawNeedles(DATA.needles[state.part], state.budget);
    const fill = () => {
      const found = unique(DATA.needles[state.part].maps.filter((map) => map.policy !== DATA.full).map((map) => map.budget));
      state.budget = found.includes(state.budget) ? state.budget : found[0] ?? null;
      const made = choice("budget", found, (value) => { state.budget = value; redraw(); }, state.budget ?? undefined);
      if (budgets) budgets.label.replaceWith(made.label);
      else byId("needle-controls").append(made.label);
      budgets = made;
    };
    const tasks = choice("task", DATA.needles.map((part, index) => [index, part.title]), (value) => {
      state.part = Number(value);
      fill();
      redraw();
    });
    byId("needle-controls").append(tasks.label);
    fill();
    later("maps", redraw);
  }

  function drawBudgets(map) {
    const layers = map.kept.map((_, layer) => String(layer));
    const heads = map.kept[0].map((_, head) => String(head));
    const height = 130 + Math.max(160, 17 * layers.length);
    const parts = [["Fraction of the prompt kept", map.kept, { template: "%{z:.2f}", scale: "Viridis", low: 0, high: 1, bar: "kept",
      height, hover: "layer %{y}, head %{x}: %{z:.4f}<extra></extra>" }]];
    if (map.bits) parts.push(["Bits per stored number, scales included", map.bits, { template: "%{z:.1f}", scale: "Cividis", low: 0,
      high: 16, bar: "bits", height, hover: "layer %{y}, head %{x}: %{z:.2f} bits<extra></extra>" }]);
    const charts = parts.map(([title, values, options]) =>
      ({ ...chart(title, "budget"), drawing: heatMap(values, heads, layers, ["kv head", "layer"], options) }));
    byId("budget-about").textContent = `Mean over ${map.n} prompt${map.n === 1 ? "" : "s"}, ${map.setting}.`;
    byId("budgets").replaceChildren(...charts.map((made) => made.figure));
    charts.forEach((made) => draw(made.target, made.drawing));
  }

  function makeBudgets() {
    byId("budget-part").hidden = !DATA.budgets.length;
    if (!DATA.budgets.length) return;
    const several = unique(DATA.budgets.map((map) => map.setting)).length > 1;
    const label = (map) => [map.budget, ...(several ? [map.setting] : [])].join(", ");
    const state = { policy: DATA.budgets[0].policy, label: label(DATA.budgets[0]) };
    let labels = null;
    const redraw = () => drawBudgets(DATA.budgets.find((map) => map.policy === state.policy && label(map) === state.label));
    const fill = () => {
      const found = DATA.budgets.filter((map) => map.policy === state.policy).map(label);
      state.label = found.includes(state.label) ? state.label : found[0];
      const made = choice("budget", found, (value) => { state.label = value; redraw(); }, state.label);
      if (labels) labels.label.replaceWith(made.label);
      else byId("budget-controls").append(made.label);
      labels = made;
    };
    const policies = choice("policy", unique(DATA.budgets.map((map) => map.policy)), (value) => {
      state.policy = value;
      fill();
      redraw();
    });
    policies.select.id = "budget-policy";
    byId("budget-controls").append(policies.label);
    fill();
    later("maps", redraw);
  }

  // Before the tabs are made, so that the first one draws its charts.
  makePareto();
  makeNeedles();
  makeBudgets();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
})();
