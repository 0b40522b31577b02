# A toolchain for build.sh: emscripten, which compiles to WebAssembly with vectors of 128 bits.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES NPLORA_BROWSER_TOOLS)
set(CMAKE_SYSTEM_NAME Emscripten)
set(CMAKE_SYSTEM_PROCESSOR wasm32)
set(CMAKE_CXX_COMPILER ${NPLORA_BROWSER_TOOLS}/em++)
set(CMAKE_AR /usr/bin/emar)
set(CMAKE_RANLIB /usr/bin/emranlib)
set(CMAKE_CXX_FLAGS_INIT "-msimd128")
set(CMAKE_SIZEOF_VOID_P 4)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF)
set(CMAKE_STRIP "")  # it would strip the section by which a module is loaded
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
