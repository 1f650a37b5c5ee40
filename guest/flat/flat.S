/*
 * The flat guest: one boot sector that runs wherever SeaBIOS does, also under a
 * KVM that emulates every instruction. It writes one dword in each page of a
 * range, pass after pass, checks each before it writes it, and keeps its state
 * at STATE (see state.go) for the host to read from the guest's memory file.
 *
 * Build: gcc -m32 -c flat.S -o flat.o
 *        ld -m elf_i386 -Ttext 0x7c00 --oformat binary flat.o -o flat.bin
 *
 * Registers, chosen so that a page costs as few instructions as possible (on
 * some hosts each is emulated on its own):
 *   eax  value that the page must hold     edx  value that it gets
 *   edi  end of the range                  ebx  next page, relative to edi
 *   esi  bytes from a page to the next     ecx  pages left in this chunk
 *   ebp  STATE
 */
        .set LOAD,    0x7c00
        .set STATE,   0x7e00            # right behind this sector
        .set COUNTER, 8                 # 64 bits: chunks done, or ticks when idle
        .set PASS,    16                # passes done
        .set LEFT,    20                # pages left in this pass after this chunk
        .set ERROR,   24                # 0, or 1 once a page was found wrong
        .set BADADDR, 28                # the page found wrong,
        .set BADHAVE, 32                # what it held,
        .set BADWANT, 36                # what it should have held
        .set STATELEN, 64
        .set IDT,     0x8000
        .set STACK,   0x7000
        .set COM1,    0x3f8

        # Parameters at the end of the sector, filled in by Config.Image, relative
        # to STATE.
        .set first, -40                 # address of the first page
        .set end, -36                   # address after the last page
        .set pages, -32
        .set span, -28                  # end - first
        .set step, -24                  # bytes from a page to the next
        .set chunk, -20                 # pages between two counts, 0 when idle
        .set delta, -16                 # what a pass adds to each page: 1, or 0
        .set report, -12                # the counter is printed when counter & report is 0
        .set divisor, -8                # 16 bits, of the timer's 1193182 Hz
        .set paced, -6                  # wait for the timer after each chunk

        .code16
        .globl _start
_start: cli
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        inb     $0x92, %al              # A20
        orb     $2, %al
        outb    %al, $0x92
        lgdtl   gdtr
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmp    $8, $start32

        .code32
start32:
        pushl   $16
        popl    %eax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $STACK, %esp
        movl    $STATE, %ebp
        xorl    %eax, %eax              # the state starts as zeros
        movl    %ebp, %edi
        pushl   $STATELEN / 4
        popl    %ecx
        rep stosl
        movl    first(%ebp), %ebx       # and so does every page
        movl    pages(%ebp), %ecx
        jecxz   2f
1:      movl    %eax, (%ebx)
        addl    $4096, %ebx
        loop    1b
2:      movl    $'L' | 'M' << 8 | 'F' << 16 | 'G' << 24, (%ebp)
        incl    4(%ebp)                 # version 1 of this layout
        movb    $'S', %al
        call    putc

        # One interrupt: the timer, as vector 32, wakes hlt.
        movl    $IDT + 32 * 8, %edi
        movl    $(8 << 16) | (tick - _start + LOAD), (%edi)
        movl    $0x8e00, 4(%edi)
        lidtl   idtr - _start + LOAD - STATE(%ebp)
        movl    $picset, %esi
        pushl   $(picend - picset) / 2
        popl    %ecx
1:      lodsb                           # pairs of port and value
        movzbl  %al, %edx
        lodsb
        outb    %al, %dx
        loop    1b
        movl    divisor(%ebp), %eax
        outb    %al, $0x40
        movb    %ah, %al
        outb    %al, $0x40

        movl    end(%ebp), %edi
        movl    step(%ebp), %esi
        movl    delta(%ebp), %edx
        xorl    %eax, %eax
        movl    pages(%ebp), %ecx
        movl    %ecx, LEFT(%ebp)
        xorl    %ebx, %ebx
        subl    span(%ebp), %ebx

loop:   movl    chunk(%ebp), %ecx
        jecxz   count                   # idle: nothing but the counter
        cmpl    LEFT(%ebp), %ecx
        jbe     1f
        movl    LEFT(%ebp), %ecx
1:      subl    %ecx, LEFT(%ebp)
page:   cmpxchgl %edx, (%edi,%ebx)      # check and write in one
        jne     wrong
        addl    %esi, %ebx
        jns     wrap
next:   loop    page
        cmpl    %ecx, LEFT(%ebp)
        jne     count
        movl    pages(%ebp), %ecx       # the pass is over
        movl    %ecx, LEFT(%ebp)
        movl    %edx, %eax
        addl    delta(%ebp), %edx
        incl    PASS(%ebp)
count:  addl    $1, COUNTER(%ebp)
        adcl    $0, COUNTER + 4(%ebp)
        movl    report(%ebp), %ecx
        testl   %ecx, COUNTER(%ebp)
        jz      say
said:   cmpb    $0, paced(%ebp)
        je      loop
        sti                             # sti holds interrupts off for one more
        hlt                             # instruction, so that none is missed
        cli
        jmp     loop

wrap:   subl    span(%ebp), %ebx
        jmp     next

wrong:  movl    %eax, BADHAVE(%ebp)     # cmpxchg has loaded what was found
        subl    delta(%ebp), %edx
        movl    %edx, BADWANT(%ebp)
        addl    %ebx, %edi
        movl    %edi, BADADDR(%ebp)
        incl    ERROR(%ebp)
        movb    $'E', %al
        call    line
1:      hlt                             # with interrupts off: for ever
        jmp     1b

say:    pushal                          # the counter, as a line of hexadecimal
        movb    $'C', %al
        movl    COUNTER(%ebp), %edi
        call    line
        popal
        jmp     said

line:   call    putc                    # al, the upper half of the counter, edi
        movl    COUNTER + 4(%ebp), %ebx
        call    hex
        movl    %edi, %ebx
        call    hex
        movb    $'\n', %al
        jmp     putc

hex:    pushl   $8
        popl    %ecx
1:      roll    $4, %ebx
        movb    %bl, %al
        andb    $15, %al
        cmpb    $10, %al                # the shortest way from nibble to digit
        sbbb    $0x69, %al
        das
        call    putc
        loop    1b
        ret

putc:   movl    $COM1, %edx
        outb    %al, %dx
        ret

        # KVM emulates no iret in protected mode. The tick only ever interrupts
        # the hlt, and the gate turned interrupts off: drop the frame and go on.
tick:   addl    $12, %esp
        xchgl   %eax, %ecx
        movb    $0x20, %al
        outb    %al, $0x20
        xchgl   %eax, %ecx
        jmp     loop

picset: .byte 0x20, 0x11, 0x21, 0x20, 0x21, 0x04, 0x21, 0x01, 0x21, 0xfe
        .byte 0xa1, 0xff                # the second controller stays masked
        .byte 0x43, 0x34                # timer 0, rate generator
picend:

gdt:    .quad 0
        .quad 0x00cf9a000000ffff
        .quad 0x00cf92000000ffff
gdtr:   .word gdtr - gdt - 1
        .long gdt
idtr:   .word 33 * 8 - 1
        .long IDT

        .org 0x1d8                      # the parameters
        .org 0x1fe
        .word 0xaa55
