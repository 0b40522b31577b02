# The bill of materials of a wheel (CycloneDX): what the build compiled in, and under which licence.
#
# This file lists only what is in the core library. auditwheel and delocate may add other libraries to a
# wheel; they list these libraries in separate files in the same folder.

# Templates and inline functions of the C++ library are compiled in. The preprocessor knows which library it
# is.
set(probe ${CMAKE_CURRENT_BINARY_DIR}/library.cpp)
file(WRITE ${probe} "#include <version>
libstdc++ = _GLIBCXX_RELEASE;
libc++ = _LIBCPP_VERSION;
stl = _MSVC_STL_VERSION;
")
execute_process(
  COMMAND ${CMAKE_CXX_COMPILER} ${CMAKE_CXX_COMPILER_ARG1} -std=c++20 -E -P ${probe}
  OUTPUT_VARIABLE library
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "The compiler does not say which C++ library it uses")
endif()
if(library MATCHES "libstdc\\+\\+ = ([0-9]+)")
  set(library_name libstdc++)
  set(library_version ${CMAKE_MATCH_1})
  set(library_license "GPL-3.0-or-later WITH GCC-exception-3.1")
  set(library_url https://gcc.gnu.org)
elseif(library MATCHES "libc\\+\\+ = ([0-9]+)([0-9][0-9])([0-9][0-9])")
  math(EXPR minor ${CMAKE_MATCH_2})
  math(EXPR patch ${CMAKE_MATCH_3})
  set(library_name libc++)
  set(library_version ${CMAKE_MATCH_1}.${minor}.${patch})
  set(library_license "Apache-2.0 WITH LLVM-exception")
  set(library_url https://libcxx.llvm.org)
elseif(library MATCHES "stl = ([0-9]+)")
  set(library_name "Microsoft STL")
  set(library_version ${CMAKE_MATCH_1})
  set(library_license "Apache-2.0 WITH LLVM-exception")
  set(library_url https://github.com/microsoft/STL)
else()
  message(FATAL_ERROR "The compiler uses a C++ library that the bill of materials does not know")
endif()

configure_file(${CMAKE_CURRENT_LIST_DIR}/sbom.cdx.json.in nplora.cdx.json @ONLY)
if(DEFINED SKBUILD_METADATA_DIR)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/nplora.cdx.json DESTINATION ${SKBUILD_METADATA_DIR}/sboms)
endif()
