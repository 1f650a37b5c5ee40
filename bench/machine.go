package bench

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/lab"
)

// Machine is what a bench ran on.
type Machine struct {
	Kernel      string `json:"kernel"`
	CPU         string `json:"cpu"`
	Cores       int    `json:"cores"`
	MemoryBytes int64  `json:"memory_bytes"`
	QEMU        string `json:"qemu"`
	Libvirt     string `json:"libvirt,omitempty"` // where it runs the guests
	// Virtualizes says whether the CPU runs guests itself. Where it does not,
	// Linux guests run under TCG, and what runs on /dev/kvm is emulated.
	Virtualizes bool `json:"cpu_virtualizes"`
}

func describeMachine(ctx context.Context, l *lab.Lab) (Machine, error) {
	m := Machine{Cores: runtime.NumCPU()}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return m, fmt.Errorf("bench: uname: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(name.Release[:])
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("bench: sysinfo: %w", err)
	}
	m.MemoryBytes = int64(info.Totalram) * int64(info.Unit)
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return m, fmt.Errorf("bench: %w", err)
	}
	defer f.Close()
	for in := bufio.NewScanner(f); in.Scan(); {
		key, value, _ := strings.Cut(in.Text(), ":")
		switch value = strings.TrimSpace(value); strings.TrimSpace(key) {
		case "model name":
			m.CPU = value
		case "flags":
			for _, flag := range strings.Fields(value) {
				m.Virtualizes = m.Virtualizes || flag == "vmx" || flag == "svm"
			}
		}
	}
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "--version").Output()
	if err != nil {
		return m, fmt.Errorf("bench: QEMU's version: %w", err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	m.QEMU = strings.TrimPrefix(first, "QEMU emulator version ")
	if l.Hypervisor() == lab.Libvirt {
		m.Libvirt, err = libvirtVersion(ctx, l)
	}
	return m, err
}
