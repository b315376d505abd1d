/* The entry point of the program. That of gcc needs __libc_start_main@GLIBC_2.34,
 * but this one uses an older version, which every glibc has. The program has no
 * constructors. */
__asm__(".symver __libc_start_main,__libc_start_main@GLIBC_2.2.5");

int main(void);

__asm__(".globl _start\n"
	".type _start, @function\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rdx, %r9\n"		/* rtld_fini */
	"	pop %rsi\n"			/* argc */
	"	mov %rsp, %rdx\n"		/* argv */
	"	and $-16, %rsp\n"
	"	push %rax\n"			/* keeps the stack aligned */
	"	push %rsp\n"			/* stack_end */
	"	xor %r8d, %r8d\n"		/* fini */
	"	xor %ecx, %ecx\n"		/* init */
	"	lea main(%rip), %rdi\n"
	"	call *__libc_start_main@GOTPCREL(%rip)\n"
	"	hlt\n");
