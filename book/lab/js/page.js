// What a page of the site does: it puts each explorer in the place of its still.
import { recalled, remember } from "./form.js";

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("explorers.css", import.meta.url);
document.head.append(style);

async function begin(place) {
  const { explorer: name } = place.dataset;
  const own = place.querySelector("script[type='application/json']"); // of what only the notebook has
  const found = own
    ? new Response(own.textContent)
    : await fetch(new URL(`data/${name}.json`, import.meta.url));
  if (!found.ok) return; // the still stays
  const table = await found.json();
  const { explore } = await import(`./${table.script ?? name}.js`);
  const made = document.createElement("div");
  place.replaceChildren(made);
  explore(made, { table, kernel: null, start: JSON.parse(place.dataset.start ?? "{}") });
  place.dataset.ready = "";
}

for (const place of document.querySelectorAll("[data-explorer]")) {
  const still = [...place.childNodes];
  try {
    await begin(place);
  } catch (error) {
    place.replaceChildren(...still); // and the others begin
    reportError(error);
  }
}

// Once the explorers have their heights, a reader who comes back to a page is where she was, and one who
// follows a link is at what it names.
const place = `scroll ${location.pathname}`;
const kept = recalled(place);
if (performance.getEntriesByType("navigation")[0]?.type === "back_forward" && kept) scrollTo(0, Number(kept));
else document.querySelector(":target")?.scrollIntoView();
addEventListener("pagehide", () => remember(place, scrollY));
