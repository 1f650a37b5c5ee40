package sys

import (
	"testing"
	"unsafe"
)

func TestABI(t *testing.T) {
	var (
		api   uffdioAPIArg
		reg   uffdioRegisterArg
		wp    uffdioWriteprotectArg
		scan  pmScanArg
		pr    PageRegion
		info  pidfdInfo
		child siginfoChild
		sc    syscallInfo
		rs    rseqConfig
	)
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"uffdio_api", unsafe.Sizeof(api), 24},
		{"uffdio_api.features", unsafe.Offsetof(api.Features), 8},
		{"uffdio_api.ioctls", unsafe.Offsetof(api.Ioctls), 16},
		{"uffdio_range", unsafe.Sizeof(reg.Range), 16},
		{"uffdio_register", unsafe.Sizeof(reg), 32},
		{"uffdio_register.mode", unsafe.Offsetof(reg.Mode), 16},
		{"uffdio_register.ioctls", unsafe.Offsetof(reg.Ioctls), 24},
		{"uffdio_writeprotect", unsafe.Sizeof(wp), 24},
		{"uffdio_writeprotect.mode", unsafe.Offsetof(wp.Mode), 16},
		{"pm_scan_arg", unsafe.Sizeof(scan), 96},
		{"pm_scan_arg.flags", unsafe.Offsetof(scan.Flags), 8},
		{"pm_scan_arg.start", unsafe.Offsetof(scan.Start), 16},
		{"pm_scan_arg.end", unsafe.Offsetof(scan.End), 24},
		{"pm_scan_arg.walk_end", unsafe.Offsetof(scan.WalkEnd), 32},
		{"pm_scan_arg.vec", unsafe.Offsetof(scan.Vec), 40},
		{"pm_scan_arg.vec_len", unsafe.Offsetof(scan.VecLen), 48},
		{"pm_scan_arg.max_pages", unsafe.Offsetof(scan.MaxPages), 56},
		{"pm_scan_arg.category_inverted", unsafe.Offsetof(scan.CategoryInverted), 64},
		{"pm_scan_arg.category_mask", unsafe.Offsetof(scan.CategoryMask), 72},
		{"pm_scan_arg.category_anyof_mask", unsafe.Offsetof(scan.CategoryAnyOf), 80},
		{"pm_scan_arg.return_mask", unsafe.Offsetof(scan.ReturnMask), 88},
		{"page_region", unsafe.Sizeof(pr), 24},
		{"page_region.end", unsafe.Offsetof(pr.End), 8},
		{"page_region.categories", unsafe.Offsetof(pr.Categories), 16},
		{"pidfd_info", unsafe.Sizeof(info), 64},
		{"pidfd_info.pid", unsafe.Offsetof(info.PID), 16},
		{"pidfd_info.ruid", unsafe.Offsetof(info.IDs), 28},
		{"pidfd_info.exit_code", unsafe.Offsetof(info.ExitCode), 60},
		{"siginfo_t", unsafe.Sizeof(child), 128},
		{"siginfo_t.si_pid", unsafe.Offsetof(child.PID), 16},
		{"siginfo_t.si_status", unsafe.Offsetof(child.Status), 24},
		{"ptrace_syscall_info", unsafe.Sizeof(sc), 88},
		{"ptrace_syscall_info.arch", unsafe.Offsetof(sc.Arch), 4},
		{"ptrace_syscall_info.instruction_pointer", unsafe.Offsetof(sc.IP), 8},
		{"ptrace_rseq_configuration", unsafe.Sizeof(rs), 24},
		{"ptrace_rseq_configuration.flags", unsafe.Offsetof(rs.Flags), 16},
		// The size is part of an ioctl's number.
		{"UFFDIO_API", uffdioAPI >> 16 & 0x3fff, unsafe.Sizeof(api)},
		{"UFFDIO_REGISTER", uffdioRegister >> 16 & 0x3fff, unsafe.Sizeof(reg)},
		{"UFFDIO_UNREGISTER", uffdioUnregister >> 16 & 0x3fff, unsafe.Sizeof(reg.Range)},
		{"UFFDIO_WRITEPROTECT", uffdioWriteprotect >> 16 & 0x3fff, unsafe.Sizeof(wp)},
		{"PAGEMAP_SCAN", pagemapScan >> 16 & 0x3fff, unsafe.Sizeof(scan)},
		{"PIDFD_GET_INFO", pidfdGetInfo >> 16 & 0x3fff, unsafe.Sizeof(info)},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d, want %d", c.name, c.got, c.want)
		}
	}
}
