// What a notebook's page loads of an explorer: it asks the kernel for the scripts and the data, which
// are so kept out of the notebook's file.
const LOOK = 500; // milliseconds between looks at the kernel
const PATIENCE = 450; // milliseconds after which one that does not answer is busy or gone
const AGAIN = 10_000; // milliseconds after which it is asked again, for a question may be lost
const GONE = ["dead", "terminating", "restarting", "autorestarting"]; // what the page may say of it

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

// The kernel as an explorer sees it: messages to it and from it, whether it is silent, what it keeps of the
// explorer for a page that is opened again, and the runs that it trains.
function kernelOf(model) {
  const [listeners, watchers] = [new Set(), new Set()];
  let [silent, dead, timer] = [false, false, 0];
  let started = false;
  const hopes = [() => !started];
  function turn(now) {
    if (silent === now) return;
    silent = now;
    watchers.forEach((watcher) => watcher());
  }
  function later(act, wait) {
    clearTimeout(timer);
    timer = setTimeout(act, wait);
  }
  // Whether the page knows that the kernel is gone; undefined where it knows nothing of it.
  function isGone() {
    const manager = model.widget_manager;
    if (dead) return true;
    if (!manager || !("kernel" in manager)) return undefined;
    return manager.kernel?.connectionStatus !== "connected" || GONE.includes(manager.kernel.status);
  }
  // Each message makes the kernel busy for a moment, as its sign in the page shows. So it is asked only while
  // something is awaited from it, or where the page knows nothing; and one question is under way at a time.
  function look() {
    const gone = isGone();
    if (document.hidden) return later(look, LOOK);
    if (gone || (gone === false && !hopes.some((awaits) => awaits()))) return turn(gone), later(look, LOOK);
    quietly(() => model.send({ verb: "ping" }));
    later(() => (turn(true), later(look, AGAIN)), PATIENCE);
  }
  function told(message) {
    later(look, LOOK);
    turn(false);
    started = true;
    listeners.forEach((listener) => listener(message));
  }
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
  on("comm_live_update", () => ((dead = true), look()));
  look();
  return {
    send: (message) => quietly(() => model.send(message)),
    listen: (listener) => (listeners.add(listener), () => listeners.delete(listener)),
    saved: () => model.get("kept"),
    save: (kept) => quietly(() => (model.set("kept", kept), model.save_changes())),
    runs: () => model.get("runs"),
    onRuns: (listener) => on("change:runs", () => (told({ kind: "runs" }), listener(model.get("runs")))),
    // while `awaits()`, the kernel is asked whether it is there
    whenever: (awaits) => hopes.push(awaits),
    isSilent: () => silent,
    onSilence: (watcher) => (watchers.add(watcher), () => watchers.delete(watcher)),
    leave() {
      clearTimeout(timer);
      bound.forEach(([event, listener]) => model.off(event, listener));
    },
  };
}

function render({ model, el }) {
  const kernel = kernelOf(model);
  // else JupyterLab takes the arrow keys of sliders and handles
  el.addEventListener("focusin", ({ target }) => target.setAttribute("data-lm-suppress-shortcuts", ""));
  const starting = () => {
    el.textContent = kernel.isSilent()
      ? "The kernel is busy or gone. The explorer starts when the running cell ends; if none runs, run its cell again."
      : "The explorer starts …";
  };
  starting();
  const waits = kernel.onSilence(starting);
  const forget = kernel.listen(async (message) => {
    if (message.kind !== "start") return;
    forget();
    waits();
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
