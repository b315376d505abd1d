/* The build includes this file before each file of the worker. In glibc 2.34 these
 * functions moved to another library and got a new version, which older systems do
 * not have. The old version is in every glibc. */
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
__asm__(".symver dlerror,dlerror@GLIBC_2.2.5");
__asm__(".symver pthread_create,pthread_create@GLIBC_2.2.5");
