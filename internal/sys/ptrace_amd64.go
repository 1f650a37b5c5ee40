package sys

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ptrace stops, as the kernel reports them: the low 8 bits are the signal, the
// next 8 the event.
const (
	// StopSyscall is the signal of a stop at a system call's entry or exit.
	StopSyscall = int(unix.SIGTRAP) | 0x80
	// StopEvent is the event of PTRACE_INTERRUPT and of group stops.
	StopEvent = unix.PTRACE_EVENT_STOP
)

// Values of SyscallStop.
const (
	SyscallNone  = 0
	SyscallEntry = 1
	SyscallExit  = 2
)

const (
	ptraceGetSigmask    = 0x420a
	ptraceSetSigmask    = 0x420b
	ptraceGetRseqConfig = 0x420f
	ntX86XState         = 0x202
)

// siginfoChild is siginfo_t as waitid(2) fills it on 64-bit machines.
type siginfoChild struct {
	Signo  int32
	Errno  int32
	Code   int32
	_      int32
	PID    int32
	UID    uint32
	Status int32
	_      [100]byte
}

// syscallInfo is the head of struct ptrace_syscall_info.
type syscallInfo struct {
	Op   uint8
	_    [3]byte
	Arch uint32
	IP   uint64
	SP   uint64
	_    [64]byte
}

// rseqConfig is struct ptrace_rseq_configuration.
type rseqConfig struct {
	Pointer   uint64
	Size      uint32
	Signature uint32
	Flags     uint32
	_         uint32
}

func ptrace(req, pid int, addr, data uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(req), uintptr(pid), addr, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// ptracePtr is ptrace for requests whose data is a structure.
func ptracePtr(req, pid int, addr uintptr, data unsafe.Pointer) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(req), uintptr(pid), addr, uintptr(data), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// PtraceSeize attaches the calling OS thread, to which alone the later requests
// are open, without stopping the traced one. Syscall stops are marked as
// StopSyscall.
func PtraceSeize(tid int) error {
	if err := ptrace(unix.PTRACE_SEIZE, tid, 0, unix.PTRACE_O_TRACESYSGOOD); err != nil {
		return fmt.Errorf("PTRACE_SEIZE %d: %w", tid, err)
	}
	return nil
}

// PtraceInterrupt makes a seized thread stop.
func PtraceInterrupt(tid int) error {
	if err := ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0); err != nil {
		return fmt.Errorf("PTRACE_INTERRUPT %d: %w", tid, err)
	}
	return nil
}

// PtraceCont lets a stopped thread run on, with the signal delivered to it if
// it is not zero and the thread is in a signal delivery stop.
func PtraceCont(tid int, sig unix.Signal) error {
	if err := ptrace(unix.PTRACE_CONT, tid, 0, uintptr(sig)); err != nil {
		return fmt.Errorf("PTRACE_CONT %d: %w", tid, err)
	}
	return nil
}

// PtraceSyscall is PtraceCont up to the next entry or exit of a system call.
func PtraceSyscall(tid int, sig unix.Signal) error {
	if err := ptrace(unix.PTRACE_SYSCALL, tid, 0, uintptr(sig)); err != nil {
		return fmt.Errorf("PTRACE_SYSCALL %d: %w", tid, err)
	}
	return nil
}

// PtraceDetach ends tracing and lets the thread run.
func PtraceDetach(tid int) error {
	if err := ptrace(unix.PTRACE_DETACH, tid, 0, 0); err != nil {
		return fmt.Errorf("PTRACE_DETACH %d: %w", tid, err)
	}
	return nil
}

// PtraceGetRegs reads the general registers.
func PtraceGetRegs(tid int) (unix.PtraceRegs, error) {
	var r unix.PtraceRegs
	if err := ptracePtr(unix.PTRACE_GETREGS, tid, 0, unsafe.Pointer(&r)); err != nil {
		return r, fmt.Errorf("PTRACE_GETREGS %d: %w", tid, err)
	}
	return r, nil
}

// PtraceSetRegs writes all general registers in one system call.
func PtraceSetRegs(tid int, r *unix.PtraceRegs) error {
	if err := ptracePtr(unix.PTRACE_SETREGS, tid, 0, unsafe.Pointer(r)); err != nil {
		return fmt.Errorf("PTRACE_SETREGS %d: %w", tid, err)
	}
	return nil
}

// PtraceXState reads the extended state of the FPU, in XSAVE's standard format.
func PtraceXState(tid int) ([]byte, error) {
	b := make([]byte, 1<<16)
	iov := unix.Iovec{Base: unsafe.SliceData(b)}
	iov.SetLen(len(b))
	if err := ptracePtr(unix.PTRACE_GETREGSET, tid, ntX86XState, unsafe.Pointer(&iov)); err != nil {
		return nil, fmt.Errorf("PTRACE_GETREGSET %d NT_X86_XSTATE: %w", tid, err)
	}
	return b[:iov.Len], nil
}

// PtraceSigmask reads the set of blocked signals, bit 0 being signal 1.
func PtraceSigmask(tid int) (uint64, error) {
	var m uint64
	if err := ptracePtr(ptraceGetSigmask, tid, unsafe.Sizeof(m), unsafe.Pointer(&m)); err != nil {
		return 0, fmt.Errorf("PTRACE_GETSIGMASK %d: %w", tid, err)
	}
	return m, nil
}

// PtraceSetSigmask sets the blocked signals.
func PtraceSetSigmask(tid int, m uint64) error {
	if err := ptracePtr(ptraceSetSigmask, tid, unsafe.Sizeof(m), unsafe.Pointer(&m)); err != nil {
		return fmt.Errorf("PTRACE_SETSIGMASK %d: %w", tid, err)
	}
	return nil
}

// PtraceSyscallStop says whether a stopped thread is at the entry of a system
// call, at its exit, or at neither.
func PtraceSyscallStop(tid int) (int, error) {
	var s syscallInfo
	if err := ptracePtr(unix.PTRACE_GET_SYSCALL_INFO, tid, unsafe.Sizeof(s), unsafe.Pointer(&s)); err != nil {
		return 0, fmt.Errorf("PTRACE_GET_SYSCALL_INFO %d: %w", tid, err)
	}
	return int(s.Op), nil
}

// PtraceRseq returns the address of a thread's struct rseq, zero if it has
// registered none.
func PtraceRseq(tid int) (uint64, error) {
	var c rseqConfig
	if err := ptracePtr(ptraceGetRseqConfig, tid, unsafe.Sizeof(c), unsafe.Pointer(&c)); err != nil {
		return 0, fmt.Errorf("PTRACE_GET_RSEQ_CONFIGURATION %d: %w", tid, err)
	}
	return c.Pointer, nil
}

// WaitStop looks, without waiting, for a stop of a thread that the calling OS
// thread traces. stop is zero when there is none yet. It never reaps: the end
// of a process is left to its parent.
func WaitStop(tid int) (stop int, err error) {
	var si siginfoChild
	const options = unix.WSTOPPED | unix.WNOHANG | unix.WALL | unix.WNOTHREAD
	for {
		_, _, errno := unix.Syscall6(unix.SYS_WAITID, unix.P_PID, uintptr(tid), uintptr(unsafe.Pointer(&si)), options, 0, 0)
		switch errno {
		case 0:
			if si.PID == 0 {
				return 0, nil
			}
			return int(si.Status), nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("waitid %d: %w", tid, errno)
		}
	}
}

// ReadMemory fills b from addr in another process; a short read is an error.
func ReadMemory(pid int, addr uint64, b []byte) error {
	return processVM("process_vm_readv", unix.SYS_PROCESS_VM_READV, pid, addr, b)
}

// WriteMemory writes b at addr in another process, where that process itself
// may write.
func WriteMemory(pid int, addr uint64, b []byte) error {
	return processVM("process_vm_writev", unix.SYS_PROCESS_VM_WRITEV, pid, addr, b)
}

func processVM(name string, nr uintptr, pid int, addr uint64, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	local := unix.Iovec{Base: unsafe.SliceData(b)}
	local.SetLen(len(b))
	remote := unix.RemoteIovec{Base: uintptr(addr), Len: len(b)}
	n, _, errno := unix.Syscall6(nr, uintptr(pid), uintptr(unsafe.Pointer(&local)), 1, uintptr(unsafe.Pointer(&remote)), 1, 0)
	if errno != 0 {
		return fmt.Errorf("%s %d %#x+%#x: %w", name, pid, addr, len(b), errno)
	}
	if int(n) != len(b) {
		return fmt.Errorf("%s %d %#x+%#x: %w after %d bytes", name, pid, addr, len(b), unix.EFAULT, n)
	}
	return nil
}

// cpuid runs the CPUID instruction.
func cpuid(leaf, sub uint32) (eax, ebx, ecx, edx uint32)

// XStateComponent returns where component i of the extended state lies in
// XSAVE's standard format, in bytes; Intel SDM volume 1, 13.4.3. The components
// 0 and 1, x87 and SSE, are in the first 512 bytes and not described there.
func XStateComponent(i int) (off, size int) {
	size32, off32, _, _ := cpuid(0xd, uint32(i))
	return int(off32), int(size32)
}

// PtraceSignalCode returns the si_code of the signal that a thread stopped for.
// Values above zero come from the kernel, the others from processes.
func PtraceSignalCode(tid int) (int32, error) {
	var si siginfoChild
	if err := ptracePtr(unix.PTRACE_GETSIGINFO, tid, 0, unsafe.Pointer(&si)); err != nil {
		return 0, fmt.Errorf("PTRACE_GETSIGINFO %d: %w", tid, err)
	}
	return si.Code, nil
}
