// Before the first paint, so that nothing flashes: a classic script, which the parser waits for.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("forge-theme");
  } catch {
    // Storage may be switched off: the system's theme it is.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
