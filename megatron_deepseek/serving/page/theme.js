// Read before the page is drawn, so that a chosen theme does not flash: light, dark, or the system's without a choice.
{
  let theme = null;
  try {
    theme = localStorage.getItem("theme");
  } catch {
    /* storage is switched off */
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
