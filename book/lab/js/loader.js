// What a notebook's page loads of an explorer: it asks the kernel for the scripts and the data, which
// are so kept out of the notebook's file.
const PATIENCE = 500; // milliseconds after which a kernel that does not answer is busy

const loaded = new Map(); // address of a script by its text, for all explorers of the page

// Scripts import each other as "./NAME.js", and come in an order in which that works.
function addresses(scripts) {
  const places = {};
  for (const [name, text] of scripts) {
    const bound = text.replace(/from "\.\/(\w+)\.js"/g, (_, other) => `from "${places[other]}"`);
    if (!loaded.has(bound))
      loaded.set(bound, URL.createObjectURL(new Blob([bound], { type: "text/javascript" })));
    places[name] = loaded.get(bound);
  }
  return places;
}

// The kernel as an explorer sees it: messages to it and from it, what it keeps of the explorer for a page
// that is opened again, and the runs that it trains.
function kernelOf(model) {
  const listeners = new Set();
  const told = (message) => listeners.forEach((listener) => listener(message));
  const bound = [["msg:custom", told]];
  const on = (event, listener) => (model.on(event, listener), bound.push([event, listener]));
  model.on("msg:custom", told);
  const quietly = (act) => {
    try {
      act();
    } catch {
      // the kernel is gone, as its silence will say
    }
  };
  return {
    send: (message) => quietly(() => model.send(message)),
    listen: (listener) => (listeners.add(listener), () => listeners.delete(listener)),
    saved: () => model.get("kept"),
    save: (kept) => quietly(() => (model.set("kept", kept), model.save_changes())),
    runs: () => model.get("runs"),
    onRuns: (listener) => on("change:runs", () => (told({ kind: "runs" }), listener(model.get("runs")))),
    gone: (listener) => on("comm_live_update", listener),
    leave: () => bound.forEach(([event, listener]) => model.off(event, listener)),
  };
}

function render({ model, el }) {
  const kernel = kernelOf(model);
  // else JupyterLab takes the arrow keys of sliders and handles
  el.addEventListener("focusin", ({ target }) => target.setAttribute("data-lm-suppress-shortcuts", ""));
  el.textContent = "The explorer starts …";
  const late = setTimeout(() => {
    el.textContent =
      "The kernel is busy or gone. The explorer starts when the running cell ends; if none runs, run its cell again.";
  }, PATIENCE);
  const forget = kernel.listen(async (message) => {
    if (message.kind !== "start") return;
    forget();
    clearTimeout(late);
    const { [message.name]: address } = addresses(message.scripts);
    const { explore } = await import(address);
    const style = document.createElement("style");
    style.textContent = message.style;
    el.replaceChildren(style, document.createElement("div"));
    explore(el.lastChild, { table: message.table, kernel, start: message.state });
  });
  kernel.send({ verb: "start" });
  return kernel.leave;
}

export default { render };
