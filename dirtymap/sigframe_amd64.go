package dirtymap

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// The signal frame that rt_sigreturn(2) reads on x86-64: struct rt_sigframe of
// arch/x86/include/asm/sigframe.h, offsets in bytes from its begin.
const (
	frameReturn  = 0   // pretcode: where the injected call returns to
	frameFlags   = 8   // uc.uc_flags
	frameSSFlags = 32  // uc.uc_stack.ss_flags
	frameRegs    = 48  // uc.uc_mcontext: r8 to r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags
	frameSegs    = 192 // cs, gs, fs, ss: 16 bits each
	frameFPState = 232 // uc.uc_mcontext.fpstate, a pointer
	frameSigmask = 304 // uc.uc_sigmask
	frameSize    = 440 // with the siginfo, which sigreturn only checks to be there

	// uc_flags: UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS.
	ucFlags = 1 | 2 | 4
	// An invalid mode in uc_stack makes the kernel keep the alternate stack
	// as it is: ptrace cannot tell which one is set, and sigreturn ignores
	// that restoring it failed.
	badAltStackMode = 4

	redZone = 128 // below rsp, may be in use; System V ABI 3.2.2

	// XSAVE's standard format; Intel SDM volume 1, 13.4. The kernel puts
	// struct _fpx_sw_bytes at 464, where ptrace has the mask of features.
	xsaveSoftware = 464
	xsaveHeader   = 512
	xsaveMin      = 576
	xsaveAlign    = 64
	fpMagic1      = 0x46505853
	fpMagic2      = 0x46505845
	featurePKRU   = 9
)

// component tells where a part of the extended state lies in XSAVE's standard
// format: sys.XStateComponent.
type component func(i int) (off, size int)

// fpState turns an NT_X86_XSTATE register set into what a signal frame holds:
// cut after the last feature in use, because the kernel refuses more than the
// thread has room for, and with the kernel's software bytes around it.
func fpState(xstate []byte, at component) ([]byte, error) {
	if len(xstate) < xsaveMin {
		return nil, fmt.Errorf("%w: the processor has no XSAVE (%d bytes of FPU state)", ErrUnsupported, len(xstate))
	}
	le := binary.LittleEndian
	enabled := le.Uint64(xstate[xsaveSoftware:])
	inUse := le.Uint64(xstate[xsaveHeader:]) | 3 // x87 and SSE are always there
	// The register set has the thread's protection keys whether or not the
	// header says so, and without the bit they would be reset to zero.
	inUse |= enabled & (1 << featurePKRU)
	size := xsaveMin
	for rest := inUse &^ 3; rest != 0; rest &= rest - 1 {
		off, n := at(bits.TrailingZeros64(rest))
		size = max(size, off+n)
	}
	if size > len(xstate) {
		return nil, fmt.Errorf("FPU state of %d bytes ends before its components %#x, which take %d", len(xstate), inUse, size)
	}
	fp := make([]byte, size+4)
	copy(fp, xstate[:size])
	le.PutUint64(fp[xsaveHeader:], inUse)
	sw := fp[xsaveSoftware:xsaveHeader]
	clear(sw)
	le.PutUint32(sw[0:], fpMagic1)
	le.PutUint32(sw[4:], uint32(len(fp)))
	le.PutUint64(sw[8:], inUse)
	le.PutUint32(sw[16:], uint32(size))
	le.PutUint32(fp[size:], fpMagic2)
	return fp, nil
}

// signalFrame builds the frame that gives a thread the registers regs, the
// signal mask and the FPU state fp when it executes rt_sigreturn, and says where
// on the thread's stack it belongs. A thread that executes `ret` with its stack
// pointer there goes to restorer, which must call rt_sigreturn.
func signalFrame(regs *unix.PtraceRegs, mask uint64, fp []byte, restorer uint64) (addr uint64, frame []byte) {
	fpAddr := (regs.Rsp - redZone - uint64(len(fp))) &^ (xsaveAlign - 1)
	addr = (fpAddr - frameSize) &^ 15
	frame = make([]byte, fpAddr-addr+uint64(len(fp)))
	le := binary.LittleEndian
	le.PutUint64(frame[frameReturn:], restorer)
	le.PutUint64(frame[frameFlags:], ucFlags)
	le.PutUint32(frame[frameSSFlags:], badAltStackMode)
	for i, v := range [...]uint64{
		regs.R8, regs.R9, regs.R10, regs.R11, regs.R12, regs.R13, regs.R14, regs.R15,
		regs.Rdi, regs.Rsi, regs.Rbp, regs.Rbx, regs.Rdx, regs.Rax, regs.Rcx,
		regs.Rsp, regs.Rip, regs.Eflags,
	} {
		le.PutUint64(frame[frameRegs+8*i:], v)
	}
	for i, v := range [...]uint64{regs.Cs, regs.Gs, regs.Fs, regs.Ss} {
		le.PutUint16(frame[frameSegs+2*i:], uint16(v))
	}
	le.PutUint64(frame[frameFPState:], fpAddr)
	le.PutUint64(frame[frameSigmask:], mask)
	copy(frame[fpAddr-addr:], fp)
	return addr, frame
}

// Results of an interrupted system call that the kernel never shows to user
// space: include/linux/errno.h.
const (
	eRestartSys      = 512
	eRestartNoIntr   = 513
	eRestartNoHand   = 514
	eRestartBlock    = 516
	nrRestartSyscall = 219
	syscallInsnLen   = 2
)

// resumeRegs returns the registers with which a thread goes on, found in regs
// at a stop. When the stop interrupted a system call, the kernel would restart
// it on the way back to user mode, if nothing had been diverted; here the
// registers are set to execute it once more. A call with a time limit is
// resumed through restart_syscall(2), which knows the time left, unless a
// sigreturn comes first: then it returns EINTR, as after any signal.
func resumeRegs(regs unix.PtraceRegs) unix.PtraceRegs {
	if int64(regs.Orig_rax) >= 0 {
		switch -int64(regs.Rax) {
		case eRestartSys, eRestartNoIntr, eRestartNoHand:
			regs.Rax = regs.Orig_rax
			regs.Rip -= syscallInsnLen
		case eRestartBlock:
			regs.Rax = nrRestartSyscall
			regs.Rip -= syscallInsnLen
		}
	}
	regs.Orig_rax = ^uint64(0) // no system call any more: nothing to restart
	return regs
}

var xstateComponent component = sys.XStateComponent
