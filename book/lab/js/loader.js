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

// The kernel as an explorer sees it: messages to it, and what listens to its answers.
function kernelOf(model) {
  const listeners = new Set();
  model.on("msg:custom", (message) => listeners.forEach((listener) => listener(message)));
  return {
    send: (message) => model.send(message),
    listen: (listener) => (listeners.add(listener), () => listeners.delete(listener)),
  };
}

function render({ model, el }) {
  const kernel = kernelOf(model);
  // else JupyterLab takes the arrow keys of sliders and handles
  el.addEventListener("focusin", ({ target }) => target.setAttribute("data-lm-suppress-shortcuts", ""));
  el.textContent = "The explorer starts …";
  const late = setTimeout(() => {
    el.textContent = "The kernel is busy: the explorer starts when the running cell ends.";
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
}

export default { render };
