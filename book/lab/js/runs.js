// Runs that the kernel trains in processes of their own.
import { button, element } from "./form.js";

export const SILENT = "kernel busy or gone";

// The rows of runs. A row stays the same element while its run goes on: a click on what is replaced while
// the button is down is lost.
export function runRows(place, { stop, drop }) {
  const rows = new Map();
  const draw = (runs, colours, labelOf, silent) => {
    const shown = runs.map((run) => {
      const name = `${run.size} ${run.key}`;
      if (!rows.has(name)) {
        const act = () => (row.run.over ? drop(row.run) : stop(row.run));
        const parts = [element("span", { class: "swatch" }), element("span"), element("progress", { max: 1 }), button("", act)];
        const row = { parts, made: element("div", { class: "run" }, ...parts) };
        rows.set(name, row);
      }
      const row = rows.get(name);
      row.run = run;
      const waits = silent && !run.over;
      const words = `${labelOf(run)} (${run.size}): ${waits ? `${SILENT}, last: ${run.words}` : run.words}`;
      const [swatch, said, bar, end] = row.parts;
      swatch.style.background = colours[run.key];
      if (said.textContent !== words) said.textContent = words;
      bar.value = run.progress ?? 0;
      bar.setAttribute("aria-label", words);
      const verb = run.over ? "Remove" : run.heard ? "Stop" : "Cancel";
      if (end.textContent !== verb) end.textContent = verb;
      return row.made;
    });
    if (shown.length !== place.children.length || shown.some((row, n) => row !== place.children[n]))
      place.replaceChildren(...shown);
  };
  return Object.assign(draw, { place });
}
