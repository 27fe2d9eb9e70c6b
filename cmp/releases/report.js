document.documentElement.classList.add("js");
for (const filter of document.querySelectorAll(".filter")) {
  const wall = document.getElementById(filter.dataset.wall);
  const [set, words] = [filter.querySelector("select"), filter.querySelector("input")];
  const count = filter.querySelector("output");
  const show = () => {
    const asked = words.value.trim().toLowerCase();
    let shown = 0;
    for (const card of wall.children) {
      const fits = (!set.value || card.dataset.set === set.value)
        && card.textContent.toLowerCase().includes(asked);
      card.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} shown`;
  };
  filter.addEventListener("input", show);
}
