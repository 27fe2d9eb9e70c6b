// What a page of the site does: it puts each explorer in the place of its still.
const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("explorers.css", import.meta.url);
document.head.append(style);

for (const place of document.querySelectorAll("[data-explorer]")) {
  const { explorer: name } = place.dataset;
  const own = place.querySelector("script[type='application/json']"); // of what only the notebook has
  const found = own
    ? new Response(own.textContent)
    : await fetch(new URL(`data/${name}.json`, import.meta.url));
  if (!found.ok) continue; // the still stays
  const table = await found.json();
  const { explore } = await import(`./${place.dataset.script ?? table.script ?? name}.js`);
  const made = document.createElement("div");
  place.replaceChildren(made);
  explore(made, { table, kernel: null, start: JSON.parse(place.dataset.start ?? "{}") });
  place.dataset.ready = "";
}
