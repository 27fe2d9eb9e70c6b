// Widgets of an executed notebook, on a page without a kernel: from their stored state.
import fs from "node:fs";
import { escape } from "./html.mjs";

// The calls of those that the page answers itself, from a table that `cmpt site` computed.
export const ANSWERED = /\b(mixture|schedule)_explorer\(/;

const SHOWN = /^(HTML|HTMLMath|Label|Image|Box|HBox|VBox|GridBox|FloatProgress|IntProgress)Model$/;

const reference = (name) => String(name).replace("IPY_MODEL_", "");

function tree(view, all) {
  const inner = (all[view]?.state.children ?? []).map(reference);
  return [view, ...inner.flatMap((each) => tree(each, all))];
}

// Whether the browser can do all that these widgets do: a picture that Python draws cannot follow a
// control, and what has no control has nothing to answer.
export function isLive(view, all) {
  const names = tree(view, all).map((each) => all[each].model_name);
  return !names.includes("ImageModel") && !names.every((name) => SHOWN.test(name));
}

function value({ model_name: name, state }) {
  if (state._options_labels)
    return [state.index ?? []]
      .flat()
      .map((n) => state._options_labels[n])
      .join(", ");
  if (name === "CheckboxModel") return state.value ? "yes" : "no";
  if (typeof state.value !== "number") return String(state.value ?? "");
  if (state.readout_format?.includes("%")) return `${Math.round(100 * state.value)} %`;
  return String(Number(state.value.toPrecision(3)));
}

function bytes(state, all, view) {
  const stored = (all[view].buffers ?? []).find((each) => each.path[0] === "value");
  return `data:image/${state.format ?? "png"};base64,${stored?.data ?? ""}`;
}

function shown(view, all, controls) {
  const { model_name: name, state } = all[view];
  if (state.children) {
    const parts = state.children.map((each) => shown(reference(each), all, controls));
    return name === "HBoxModel" ? `<div class="row">${parts.join("")}</div>` : parts.join("");
  }
  if (/^(HTML|HTMLMath)Model$/.test(name)) return state.value ? `<div class="said">${state.value}</div>` : "";
  if (name === "LabelModel") return `<div class="said">${escape(state.value)}</div>`;
  if (/ProgressModel$/.test(name)) {
    return `<progress value="${state.value}" max="${state.max}" aria-label="Progress"></progress>`;
  }
  if (name === "ImageModel") {
    return `<figure class="drawn"><img src="${bytes(state, all, view)}" alt="The explorer's figure for the settings above"></figure>`;
  }
  if (state.description && !state.disabled && !/^ButtonModel$/.test(name)) {
    controls.push(`<li><b>${escape(state.description)}</b> ${escape(value(all[view]))}</li>`);
  }
  return "";
}

// What the widgets showed when the chapter was executed, and how to move them.
export function still(view, all, context) {
  const controls = [];
  const body = shown(view, all, controls);
  if (!controls.length) return `<div class="still">${body}</div>`;
  const chapter = context.page.location?.split("/").at(-1) ?? "this chapter";
  const how =
    `<p class="how">This picture stands still: it needs Python. To move the controls, run <code>make lab</code> ` +
    `and open <code>${escape(chapter)}</code>.</p>`;
  return `<div class="still"><ul class="settings">${controls.join("")}</ul>${body}${how}</div>`;
}

// The explorer's place; until its script has run, the still is there.
export function answering(name, inner, { base }) {
  const data = new URL(`./public/data/${name}.json`, import.meta.url);
  if (!fs.existsSync(data)) return inner;
  return `<div class="answering" data-explorer="${name}" data-source="${base}/data/${name}.json">${inner}</div>`;
}
