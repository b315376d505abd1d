/* Included before each file of the worker by the build for old systems: these
 * functions moved to another library in glibc 2.34 and got a new version there,
 * which systems before it do not have. */
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
__asm__(".symver dlerror,dlerror@GLIBC_2.2.5");
__asm__(".symver pthread_create,pthread_create@GLIBC_2.2.5");
