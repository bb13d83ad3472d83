"use strict";
// The sample viewer: a prompt with the tokens that two policies kept, side by side.

(() => {
  if (!DATA.samples.length) return;
  const state = { sample: 0, layer: ALL, head: ALL, sides: [0, 0], cursor: null };
  const selects = {};
  const panes = [];

  const FAINTEST = 0.12;  // shade of a token that a single head kept

  const sample = () => DATA.samples[state.sample];
  const labelOf = (answer) => (answer.policy === DATA.full ? "full cache" : `${answer.policy}, ${answer.budget}`);
  const shape = () => sample().answers.find((answer) => answer.shape)?.shape ?? [0, 0, 0];

  // The answers that were shown before, where the sample has them; else the first policies at their smallest budget.
  function sidesFor(before) {
    const { answers } = sample();
    const names = unique(answers.map((answer) => answer.policy)).filter((name) => name !== DATA.full);
    const smallest = names.map((name) => answers.findLastIndex((answer) => answer.policy === name));
    return [smallest[0] ?? 0, smallest[1] ?? 0].map((fallback, side) => {
      const same = answers.findIndex((answer) => before[side] && labelOf(answer) === labelOf(before[side]));
      return same >= 0 ? same : fallback;
    });
  }

  function fillChoices() {
    const [layers, heads] = shape();
    for (const [key, count] of [["layer", layers], ["head", heads]]) {
      const numbers = [...Array(count).keys()].map((number) => [String(number), `${key} ${number}`]);
      const options = [[ALL, `all ${count} ${key}s`], ...numbers];
      if (state[key] !== ALL && Number(state[key]) >= count) state[key] = ALL;
      selects[key].replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
      selects[key].value = state[key];
    }
    for (const pane of panes) {
      const options = sample().answers.map((answer, index) => element("option", { value: index }, labelOf(answer)));
      pane.select.replaceChildren(...options);
    }
  }

  function facts(answer) {
    const parts = [`${sized(answer.bytes)} of ${sized(answer.bytes_full)}`, `${shownNumber(100 * answer.spent, 1)} % of the entries`];
    if (answer.score !== null) parts.unshift(`score ${shownNumber(answer.score, 0)}`);
    if (answer.kl !== null) parts.push(`KL ${shownNumber(answer.kl, 4)}`);
    return parts.join(" · ");
  }

  function drawQuestion() {
    const { after, expected, setting, cut_tokens: cut, kind } = sample();
    const named = kind === "text" ? "Text that follows" : setting === "query_aware" ? "Read after compression; the question is in the prompt"
      : "Question, read after compression";
    const parts = [[named, after.trim()]];
    if (expected) parts.push(["Correct answer", expected.join(" · ")]);
    if (cut) parts.push(["Left out", `${cut} tokens of the prompt's middle`]);
    byId("question").replaceChildren(element("dl", {}, ...parts.flatMap(([term, text]) =>
      [element("dt", {}, term), element("dd", {}, text)])));
  }

  function makePane(side) {
    const made = choice(side ? "right" : "left", [], (value) => { state.sides[side] = Number(value); drawSide(side); });
    made.select.id = side ? "right" : "left";
    const pane = { select: made.select, facts: element("div", { class: "facts" }), answer: element("div", { class: "answer" }),
      heads: element("div", { class: "heads", "aria-hidden": "true" }), spans: [],
      tokens: element("div", { class: "tokens", tabindex: "0", role: "group", onkeydown: moveCursor,
        "aria-label": `tokens of the prompt, ${side ? "right" : "left"}` }) };
    pane.tokens.addEventListener("mouseover", (event) => {
      const index = pane.spans.indexOf(event.target);
      if (index >= 0) setCursor(index, false);
    });
    byId("panes").append(element("div", { class: "pane" }, element("div", { class: "controls" }, made.label),
      pane.facts, pane.answer, pane.heads, pane.tokens));
    panes.push(pane);
  }

  function drawTokens() {
    for (const pane of panes) {
      pane.spans = sample().tokens.map((text) => element("span", {}, visible(text)));
      pane.tokens.replaceChildren(...pane.spans);
      pane.tokens.scrollTop = 0;
    }
    state.cursor = null;
  }

  function drawHeads(pane, answer) {
    const [layers, heads] = answer.shape ?? [0, 0];
    pane.heads.style.gridTemplateColumns = `repeat(${layers}, minmax(5px, 1fr))`;
    const shares = answer.kept === null ? null : sharesOf(answer);
    const cells = [];
    for (let head = 0; head < heads; head += 1) {
      for (let layer = 0; layer < layers; layer += 1) {
        const share = shares[layer][head];
        const bits = answer.bits?.[layer][head];
        const title = `layer ${layer}, head ${head}: ${shownNumber(100 * share, 1)} % kept` + (bits ? `, ${shownNumber(bits, 1)} bits` : "");
        const chosen = [ALL, String(layer)].includes(state.layer) && [ALL, String(head)].includes(state.head)
          && !(state.layer === ALL && state.head === ALL);
        cells.push(element("i", { title, style: `--share: ${Math.sqrt(share).toFixed(3)}`, class: chosen ? "chosen" : null,
          onclick: () => choose({ layer: String(layer), head: String(head) }) }));
      }
    }
    pane.heads.replaceChildren(...cells);
  }

  async function drawSide(side) {
    const pane = panes[side];
    const answer = sample().answers[state.sides[side]];
    pane.select.value = state.sides[side];
    pane.facts.textContent = facts(answer);
    pane.answer.textContent = answer.answer === null ? "" : answer.answer || "(empty answer)";
    pane.answer.hidden = answer.answer === null;
    await bitsOf(answer);
    if (answer !== sample().answers[state.sides[side]]) return;  // another one was chosen meanwhile
    const [layers, heads] = shape();
    const most = Math.max(1, chosenNumbers(state.layer, layers).length * chosenNumbers(state.head, heads).length);
    pane.counts = countsOf(answer, state.layer, state.head);
    pane.most = most;
    pane.spans.forEach((span, token) => {
      const count = pane.counts === null ? most : pane.counts[token];
      span.style.setProperty("--share", count ? (FAINTEST + (1 - FAINTEST) * count / most).toFixed(3) : 0);
      span.classList.toggle("evicted", count === 0);
    });
    drawHeads(pane, answer);
    byId("scale-end").textContent = most === 1 ? "kept" : `kept by all ${most} heads`;
    showCursor();
  }

  const drawSides = () => Promise.all([drawSide(0), drawSide(1)]);

  function drawSample(before = []) {
    state.sides = sidesFor(before);
    selects.sample.value = state.sample;
    fillChoices();
    drawQuestion();
    drawTokens();
    drawSides();
    showCursor();
  }

  function choose(change) {
    Object.assign(state, change);
    for (const key of ["layer", "head"]) selects[key].value = state[key];
    drawSides();
  }

  // The token under the cursor, in both panes.
  function setCursor(index, scroll) {
    const { tokens } = sample();
    panes.forEach((pane) => pane.spans[state.cursor]?.classList.remove("here"));
    state.cursor = Math.min(Math.max(index, 0), tokens.length - 1);
    for (const pane of panes) {
      const span = pane.spans[state.cursor];
      span.classList.add("here");
      if (scroll) pane.tokens.scrollTop = Math.max(0, span.offsetTop - pane.tokens.clientHeight / 2);
    }
    showCursor();
  }

  function showCursor() {
    if (state.cursor === null) {
      byId("token").textContent = `${sample().tokens.length} tokens; point to one, or focus the tokens and use the arrow keys`;
      return;
    }
    const counts = panes.map((pane, side) => {
      const answer = sample().answers[state.sides[side]];
      const count = pane.counts ? pane.counts[state.cursor] : pane.most;
      return `${labelOf(answer)}: ${count} of ${pane.most}`;
    });
    byId("token").textContent = `token ${state.cursor} ${JSON.stringify(sample().tokens[state.cursor])} · heads that kept it, ${unique(counts).join("; ")}`;
  }

  function moveCursor(event) {
    const from = state.cursor ?? -1;
    const targets = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: sample().tokens.length - 1 };
    if (!(event.key in targets) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    setCursor(targets[event.key], true);
  }

  function stepped(key, step) {
    const options = [...selects[key].options].map((option) => option.value);
    const place = options.indexOf(String(state[key]));
    return options.at((place + step + options.length) % options.length);
  }

  function goTo(index) {
    const before = state.sides.map((side) => sample().answers[side]);
    state.sample = (index + DATA.samples.length) % DATA.samples.length;
    drawSample(before);
  }

  function onKey(event) {
    if (byId("samples").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
    if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
    const step = event.shiftKey ? -1 : 1;
    const actions = {
      l: () => choose({ layer: stepped("layer", step) }),
      h: () => choose({ head: stepped("head", step) }),
      n: () => goTo(state.sample + 1),
      p: () => goTo(state.sample - 1),
      x: () => { state.sides.reverse(); drawSides(); },
    };
    const action = actions[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  }

  const made = {
    sample: choice("sample", DATA.samples.map((found, index) => [index, found.title]), (value) => goTo(Number(value))),
    layer: choice("layer", [], (value) => choose({ layer: value })),
    head: choice("head", [], (value) => choose({ head: value })),
  };
  for (const [key, { select, label }] of Object.entries(made)) {
    select.id = `sample-${key}`;
    selects[key] = select;
    byId("sample-controls").append(label);
  }
  makePane(0);
  makePane(1);
  drawSample();
  document.addEventListener("keydown", onKey);
})();
