"use strict";
// What heads kept of a prompt: bits [layers, heads, tokens] of an answer, inflated when they are first looked at.

const ALL = "all";

async function bitsOf(answer) {
  if (answer.kept === null || answer.bytesOfBits) return;
  answer.bytesOfBits = await inflated(answer.kept);
}

function isKept(answer, layer, head, token) {
  const [, heads, tokens] = answer.shape;
  const place = (layer * heads + head) * tokens + token;
  return (answer.bytesOfBits[place >> 3] >> (7 - (place & 7))) & 1;
}

// Numbers of the layers or heads that a choice stands for.
const chosenNumbers = (chosen, count) => (chosen === ALL ? [...Array(count).keys()] : [Number(chosen)]);

// How many of the chosen heads kept each token; null where every head keeps every token.
function countsOf(answer, layer, head) {
  if (answer.kept === null) return null;
  const [layers, heads, tokens] = answer.shape;
  const counts = new Uint32Array(tokens);
  for (const l of chosenNumbers(layer, layers)) {
    for (const h of chosenNumbers(head, heads)) {
      for (let token = 0; token < tokens; token += 1) counts[token] += isKept(answer, l, h, token);
    }
  }
  return counts;
}

// Kept fraction of every head: [layers][heads].
function sharesOf(answer) {
  const [layers, heads, tokens] = answer.shape;
  return [...Array(layers).keys()].map((layer) => [...Array(heads).keys()].map((head) => {
    let kept = 0;
    for (let token = 0; token < tokens; token += 1) kept += isKept(answer, layer, head, token);
    return kept / tokens;
  }));
}

// A token as it is shown: line feeds and tabs are visible.
const visible = (text) => text.replaceAll("\t", "⇥\t").replaceAll("\n", "↵\n");
