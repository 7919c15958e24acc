// A button in the corner of each block of code copies it; of a session, only what was typed.
document.addEventListener("DOMContentLoaded", () => {
  if (!navigator.clipboard) return;
  for (const block of document.querySelectorAll(
    ".highlight-python, .highlight-bash, .highlight-pycon, .doctest")) {
    const code = block.querySelector("pre").textContent;
    const typed = code.match(/^(>>>|\.\.\.) ?.*$/gm);
    const button = document.createElement("button");
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      const text = code.startsWith(">>>") ? typed.map((line) => line.slice(4)).join("\n") : code;
      await navigator.clipboard.writeText(text.trimEnd() + "\n");
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    block.append(button);
  }
});
