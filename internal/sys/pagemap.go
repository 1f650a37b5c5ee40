package sys

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Categories of pages in PAGEMAP_SCAN, from include/uapi/linux/fs.h.
const (
	PageIsWPAllowed = 1 << 0
	PageIsWritten   = 1 << 1
	PageIsFile      = 1 << 2
	PageIsPresent   = 1 << 3
	PageIsSwapped   = 1 << 4
	PageIsPFNZero   = 1 << 5
	PageIsHuge      = 1 << 6
	PageIsSoftDirty = 1 << 7
)

// Flags of PAGEMAP_SCAN.
const (
	ScanWPMatching   = 1 << 0 // write-protect the pages that are reported
	ScanCheckWPAsync = 1 << 1 // fail with EPERM where asynchronous WP is off
)

const pagemapScan = 0xc0606610

// PageRegion is struct page_region: a run of pages of the same categories, as
// byte addresses.
type PageRegion struct {
	Start      uint64
	End        uint64
	Categories uint64
}

// Scan says what PAGEMAP_SCAN is to look for. A page matches when it is in all
// categories of Mask (with Inverted ones negated) and in at least one of AnyOf,
// if AnyOf is not zero.
type Scan struct {
	Flags    uint64
	Start    uint64 // first byte
	End      uint64 // one past the last byte
	Inverted uint64
	Mask     uint64
	AnyOf    uint64
	Return   uint64 // categories to report
}

// pmScanArg is struct pm_scan_arg.
type pmScanArg struct {
	Size             uint64
	Flags            uint64
	Start            uint64
	End              uint64
	WalkEnd          uint64
	Vec              *PageRegion
	VecLen           uint64
	MaxPages         uint64
	CategoryInverted uint64
	CategoryMask     uint64
	CategoryAnyOf    uint64
	ReturnMask       uint64
}

// PagemapScan scans page tables through fd, an open /proc/PID/pagemap. It fills
// vec and returns how many entries are valid and the address where the walk
// stopped: before s.End when vec was full. vec must not be empty.
func PagemapScan(fd int, s Scan, vec []PageRegion) (n int, walkEnd uint64, err error) {
	arg := pmScanArg{
		Flags:            s.Flags,
		Start:            s.Start,
		End:              s.End,
		Vec:              unsafe.SliceData(vec),
		VecLen:           uint64(len(vec)),
		CategoryInverted: s.Inverted,
		CategoryMask:     s.Mask,
		CategoryAnyOf:    s.AnyOf,
		ReturnMask:       s.Return,
	}
	arg.Size = uint64(unsafe.Sizeof(arg))
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		switch errno {
		case 0:
			return int(r), arg.WalkEnd, nil
		case unix.EINTR:
			// With protection a part may be done and its report lost, so
			// that only a scan that changes nothing may be repeated.
			if s.Flags&ScanWPMatching == 0 {
				continue
			}
		}
		return 0, s.Start, fmt.Errorf("PAGEMAP_SCAN %#x-%#x: %w", s.Start, s.End, errno)
	}
}
