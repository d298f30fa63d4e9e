/*
 * The guest of the KVM probe: what every operating system does in its first
 * seconds, with a digit on port 0xe9 after each step and the verdict on port 0xf4:
 * 0x42 good, 1 an unexpected exception, 2 a wrong result.
 *
 * It is a multiboot image (QEMU -kernel) loaded at 1 MiB, entered in 32-bit
 * protected mode with paging off, and needs 4 MiB of RAM. The raw KVM stage enters
 * it at the same point. Rebuild: see payload/build.sh.
 *
 *   1  long mode, GDT, IDT, TSS loaded        5  iretq to ring 3
 *   2  EFER, STAR, LSTAR, SFMASK read back    6  SYSCALL lands in ring 0
 *   3  CR3 and CR4 written, INVLPG            7  SYSRETQ and back
 *   4  page fault through the IDT, IRETQ      8  2000 remapped pages seen at once
 */
	.set BASE,  0x100000
	.set PML4,  0x110000
	.set PDPT,  0x111000
	.set PD,    0x112000
	.set PT,    0x113000	/* maps the first 2 MiB one to one */
	.set IDT,   0x115000
	.set KSTACK,0x120000	/* top */
	.set USTACK,0x124000	/* top */
	.set HOLE,  0x130000	/* page taken away for the fault */
	.set WINDOW,0x131000	/* page pointed at PAGE_A and PAGE_B in turn */
	.set PAGE_A,0x132000
	.set PAGE_B,0x133000
	.set KCODE, 0x08
	.set KDATA, 0x10
	.set UBASE, 0x18	/* SYSRETQ: SS = +8, CS = +16 */
	.set UDATA, 0x20
	.set UCODE, 0x28
	.set TSSSEL,0x30
	.set MAGIC, 0x5ca1ab1e

	.code32
	.text
	.globl start
start:
header:
	.long 0x1badb002, 0x00010000, -(0x1badb002 + 0x00010000)
	.long BASE, BASE, BASE + (end - start), 0, BASE + (entry - start)

entry:
	cli
	cld
	mov $PML4, %edi
	xor %eax, %eax
	mov $(0x24000 / 4), %ecx
	rep stosl
	movl $(PDPT + 7), PML4
	movl $(PD + 7), PDPT
	movl $(PT + 7), PD
	mov $PT, %edi
	mov $7, %eax
	mov $512, %ecx
1:	mov %eax, (%edi)
	add $4096, %eax
	add $8, %edi
	loop 1b
	lgdt BASE + (gdtr - start)
	mov %cr4, %eax
	or $0x20, %eax			/* PAE */
	mov %eax, %cr4
	mov $PML4, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx		/* EFER: SCE, LME */
	rdmsr
	or $0x101, %eax
	wrmsr
	mov %cr0, %eax
	or $0x80010001, %eax		/* PG, WP, PE */
	mov %eax, %cr0
	ljmp $KCODE, $(BASE + (long - start))

	.code64
long:
	mov $KDATA, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov $KSTACK, %esp
	/* every vector fails, but 14 */
	mov $IDT, %edi
	mov $32, %ecx
1:	mov $(BASE + (bad_exception - start)), %eax
	call set_gate
	loop 1b
	mov $(IDT + 14 * 16), %edi
	mov $(BASE + (page_fault - start)), %eax
	call set_gate
	lidt BASE + (idtr - start)
	mov $TSSSEL, %eax
	ltr %ax
	mov $'1', %al
	out %al, $0xe9

	mov $0xc0000080, %ecx
	rdmsr
	and $0x501, %eax		/* LMA, LME, SCE */
	cmp $0x501, %eax
	jne wrong
	mov $0xc0000081, %ecx		/* STAR */
	xor %eax, %eax
	mov $((UBASE << 16) | KCODE), %edx
	wrmsr
	xor %edx, %edx
	rdmsr
	cmp $((UBASE << 16) | KCODE), %edx
	jne wrong
	mov $0xc0000082, %ecx		/* LSTAR */
	mov $(BASE + (syscall_entry - start)), %eax
	xor %edx, %edx
	wrmsr
	xor %eax, %eax
	rdmsr
	cmp $(BASE + (syscall_entry - start)), %eax
	jne wrong
	mov $0xc0000084, %ecx		/* SFMASK: IF, DF, TF */
	mov $0x700, %eax
	xor %edx, %edx
	wrmsr
	xor %eax, %eax
	rdmsr
	cmp $0x700, %eax
	jne wrong
	mov $'2', %al
	out %al, $0xe9

	mov %cr3, %rax
	mov %rax, %cr3
	mov %cr4, %rax
	or $0x80, %rax			/* PGE, which flushes everything */
	mov %rax, %cr4
	and $~0x80, %rax
	mov %rax, %cr4
	invlpg HOLE
	mov $'3', %al
	out %al, $0xe9

	movl $MAGIC, HOLE
	movq $0, PT + (HOLE >> 12) * 8
	invlpg HOLE
	xor %ebp, %ebp
	mov HOLE, %eax			/* the handler maps it again */
	cmp $MAGIC, %eax
	jne wrong
	cmp $1, %ebp
	jne wrong
	mov $'4', %al
	out %al, $0xe9

	xor %ebx, %ebx			/* how many system calls came */
	pushq $(UDATA | 3)
	pushq $USTACK
	pushq $2
	pushq $(UCODE | 3)
	pushq $(BASE + (user - start))
	iretq

user:
	mov %cs, %eax
	cmp $(UCODE | 3), %eax
	jne user_wrong
	mov $1, %edi
	syscall
after_first:
	mov %cs, %eax
	cmp $(UCODE | 3), %eax
	jne user_wrong
	mov %ss, %eax
	cmp $(UDATA | 3), %eax
	jne user_wrong
	mov $2, %edi
	syscall
user_wrong:
	mov $3, %edi
	syscall
	jmp user_wrong

syscall_entry:
	mov %cs, %eax
	cmp $KCODE, %eax
	jne wrong
	mov %ss, %eax
	cmp $KDATA, %eax
	jne wrong
	invlpg HOLE			/* privileged: faults outside ring 0 */
	mov $KSTACK, %esp
	inc %ebx
	cmp $1, %edi
	je first_call
	cmp $2, %edi
	jne wrong
	cmp $2, %ebx
	jne wrong
	mov $'7', %al
	out %al, $0xe9
	jmp remap
first_call:
	cmp $1, %ebx
	jne wrong
	cmp $(BASE + (after_first - start)), %rcx
	jne wrong
	mov $'5', %al
	out %al, $0xe9
	mov $'6', %al
	out %al, $0xe9
	sysretq

remap:
	movl $0xaaaa, PAGE_A
	movl $0xbbbb, PAGE_B
	mov $1000, %ecx
1:	movq $(PAGE_A + 7), PT + (WINDOW >> 12) * 8
	invlpg WINDOW
	cmpl $0xaaaa, WINDOW
	jne wrong
	movq $(PAGE_B + 7), PT + (WINDOW >> 12) * 8
	invlpg WINDOW
	cmpl $0xbbbb, WINDOW
	jne wrong
	loop 1b
	mov $100000, %ecx
1:	loop 1b
	mov $'8', %al
	out %al, $0xe9
	mov $0x42, %al
	jmp verdict

wrong:
	mov $'w', %al
	out %al, $0xe9
	mov $2, %al
	jmp verdict
bad_exception:
	mov $'!', %al
	out %al, $0xe9
	mov $1, %al
verdict:
	out %al, $0xf4
	hlt
	jmp verdict

page_fault:
	push %rax
	mov %cr2, %rax
	cmp $HOLE, %rax
	jne bad_exception
	cmpq $0, 8(%rsp)		/* error code: read of an absent page in ring 0 */
	jne bad_exception
	inc %ebp
	movq $(HOLE + 7), PT + (HOLE >> 12) * 8
	pop %rax
	add $8, %rsp
	iretq

/* set_gate writes an interrupt gate for eax at edi and moves edi on. */
set_gate:
	mov %ax, (%rdi)
	movw $KCODE, 2(%rdi)
	movw $0x8e00, 4(%rdi)
	shr $16, %eax
	mov %ax, 6(%rdi)
	movq $0, 8(%rdi)
	add $16, %edi
	ret

	.balign 8
gdt:
	.quad 0
	.quad 0x00af9b000000ffff	/* KCODE, 64-bit */
	.quad 0x00cf93000000ffff	/* KDATA */
	.quad 0x00cffb000000ffff	/* UBASE, 32-bit code, unused */
	.quad 0x00cff3000000ffff	/* UDATA */
	.quad 0x00affb000000ffff	/* UCODE, 64-bit */
	/* the TSS at BASE + (tss - start), below 16 MiB, 104 bytes */
	.word 103
	.word (BASE + (tss - start)) & 0xffff
	.byte (BASE + (tss - start)) >> 16
	.byte 0x89, 0, 0
	.quad 0
gdt_end:
tss:
	.long 0
	.quad KSTACK			/* RSP0 */
	.fill 92, 1, 0
	.balign 8
gdtr:
	.word gdt_end - gdt - 1
	.long BASE + (gdt - start)
	.long 0
idtr:
	.word 32 * 16 - 1
	.quad IDT
end:
