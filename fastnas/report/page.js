for (const button of document.querySelectorAll(".copy button")) {
  button.addEventListener("click", async () => {
    const box = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(box.textContent);
    } catch {
      getSelection().selectAllChildren(box);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
