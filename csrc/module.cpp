#include <Python.h>

#define FASTNAS_JOINED(a, b) a##b
#define FASTNAS_INIT(name) FASTNAS_JOINED(PyInit_, name)
#define FASTNAS_QUOTED(name) #name
#define FASTNAS_NAME(name) FASTNAS_QUOTED(name)

// Importing the module loads the library, whose static initialisers register the kernels.
extern "C" PyMODINIT_FUNC FASTNAS_INIT(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, FASTNAS_NAME(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
