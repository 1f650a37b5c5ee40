package sys

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// UserModeOnly is the flag of userfaultfd(2) that limits the descriptor to
// faults of user mode. Unprivileged processes need it; write-protection in
// asynchronous mode works the same with it, because no handler is involved.
const UserModeOnly = 1

// Features of UFFDIO_API, from include/uapi/linux/userfaultfd.h.
const (
	UffdFeaturePagefaultFlagWP         = 1 << 0
	UffdFeatureWPHugetlbfsShmem        = 1 << 12
	UffdFeatureWPUnpopulated           = 1 << 13
	UffdFeatureWPAsync                 = 1 << 15
	uffdAPIVersion                     = 0xaa
	uffdioRegisterModeWP               = 1 << 1
	uffdioWriteprotectModeWP           = 1 << 0
	uffdioAPI                          = 0xc018aa3f
	uffdioRegister                     = 0xc020aa00
	uffdioUnregister                   = 0x8010aa01
	uffdioWriteprotect                 = 0xc018aa06
	uffdioWriteprotectIoctl            = 6 // bit of UffdRegisterWP's result
	UffdIoctlWriteprotect       uint64 = 1 << uffdioWriteprotectIoctl
)

// uffdioAPIArg is struct uffdio_api.
type uffdioAPIArg struct {
	API      uint64
	Features uint64
	Ioctls   uint64
}

// uffdioRange is struct uffdio_range.
type uffdioRange struct {
	Start uint64
	Len   uint64
}

// uffdioRegisterArg is struct uffdio_register.
type uffdioRegisterArg struct {
	Range  uffdioRange
	Mode   uint64
	Ioctls uint64
}

// uffdioWriteprotectArg is struct uffdio_writeprotect.
type uffdioWriteprotectArg struct {
	Range uffdioRange
	Mode  uint64
}

// Userfaultfd creates a userfaultfd for the calling process.
func Userfaultfd(flags int) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, uintptr(flags), 0, 0)
	if errno != 0 {
		return -1, fmt.Errorf("userfaultfd: %w", errno)
	}
	return int(fd), nil
}

// UffdAPI performs the handshake on a new userfaultfd. It asks for the given
// features and returns the features that the kernel has; one that it has not
// makes the call fail with EINVAL.
func UffdAPI(fd int, features uint64) (uint64, error) {
	arg := uffdioAPIArg{API: uffdAPIVersion, Features: features}
	if err := ioctl(fd, uffdioAPI, unsafe.Pointer(&arg)); err != nil {
		return 0, fmt.Errorf("UFFDIO_API: %w", err)
	}
	return arg.Features, nil
}

// UffdRegisterWP registers size bytes at addr, in the address space that the
// userfaultfd belongs to, for write-protection. It returns the set of ioctls
// that the kernel allows on the range.
func UffdRegisterWP(fd int, addr, size uint64) (uint64, error) {
	arg := uffdioRegisterArg{Range: uffdioRange{Start: addr, Len: size}, Mode: uffdioRegisterModeWP}
	if err := ioctl(fd, uffdioRegister, unsafe.Pointer(&arg)); err != nil {
		return 0, fmt.Errorf("UFFDIO_REGISTER %#x+%#x: %w", addr, size, err)
	}
	return arg.Ioctls, nil
}

// UffdUnregister undoes UffdRegisterWP.
func UffdUnregister(fd int, addr, size uint64) error {
	arg := uffdioRange{Start: addr, Len: size}
	if err := ioctl(fd, uffdioUnregister, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("UFFDIO_UNREGISTER %#x+%#x: %w", addr, size, err)
	}
	return nil
}

// UffdWriteprotect sets or lifts the protection of size bytes at addr.
func UffdWriteprotect(fd int, addr, size uint64, protect bool) error {
	arg := uffdioWriteprotectArg{Range: uffdioRange{Start: addr, Len: size}}
	if protect {
		arg.Mode = uffdioWriteprotectModeWP
	}
	if err := ioctl(fd, uffdioWriteprotect, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("UFFDIO_WRITEPROTECT %#x+%#x: %w", addr, size, err)
	}
	return nil
}

// ioctl restarts itself after EINTR, which none of the calls here reports once
// it has done anything.
func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}
