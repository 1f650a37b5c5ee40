package sys

import (
	"testing"
	"unsafe"
)

func TestPtraceABI(t *testing.T) {
	var (
		child siginfoChild
		sc    syscallInfo
		rs    rseqConfig
	)
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"siginfo_t", unsafe.Sizeof(child), 128},
		{"siginfo_t.si_pid", unsafe.Offsetof(child.PID), 16},
		{"siginfo_t.si_status", unsafe.Offsetof(child.Status), 24},
		{"ptrace_syscall_info", unsafe.Sizeof(sc), 88},
		{"ptrace_syscall_info.arch", unsafe.Offsetof(sc.Arch), 4},
		{"ptrace_syscall_info.instruction_pointer", unsafe.Offsetof(sc.IP), 8},
		{"ptrace_rseq_configuration", unsafe.Sizeof(rs), 24},
		{"ptrace_rseq_configuration.flags", unsafe.Offsetof(rs.Flags), 16},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d, want %d", c.name, c.got, c.want)
		}
	}
}

// TestXStateComponent: AVX lies where it has on every processor.
func TestXStateComponent(t *testing.T) {
	if off, size := XStateComponent(2); size != 0 && (off != 576 || size != 256) {
		t.Errorf("AVX state at %d+%d", off, size)
	}
}
