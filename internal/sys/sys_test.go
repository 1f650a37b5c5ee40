package sys

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestABI(t *testing.T) {
	var (
		api  uffdioAPIArg
		reg  uffdioRegisterArg
		wp   uffdioWriteprotectArg
		scan pmScanArg
		pr   PageRegion
		info pidfdInfo
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

const mapsText = `55d0c0a00000-55d0c0a21000 r--p 00000000 08:01 131 /usr/bin/qemu-system-x86_64
7f0000000000-7f0040000000 rw-s 00001000 00:1a 7 /dev/shm/a b (deleted)
7f0040000000-7f0040001000 ---p 00000000 00:00 0
7f0050000000-7f0050001000 rw-s 00000000 fe:ff 12                 /tmp/line\012feed
7ffd0c1f9000-7ffd0c1fb000 r-xp 00000000 00:00 0                          [vdso]
`

func TestParseMaps(t *testing.T) {
	got, err := ParseMaps(strings.NewReader(mapsText))
	if err != nil {
		t.Fatal(err)
	}
	want := []Mapping{
		{Start: 0x55d0c0a00000, End: 0x55d0c0a21000, Read: true, DevMajor: 8, DevMinor: 1, Inode: 131, Path: "/usr/bin/qemu-system-x86_64"},
		{Start: 0x7f0000000000, End: 0x7f0040000000, Read: true, Write: true, Shared: true, Offset: 0x1000, DevMinor: 0x1a, Inode: 7, Path: "/dev/shm/a b", Deleted: true},
		{Start: 0x7f0040000000, End: 0x7f0040001000},
		{Start: 0x7f0050000000, End: 0x7f0050001000, Read: true, Write: true, Shared: true, DevMajor: 0xfe, DevMinor: 0xff, Inode: 12, Path: "/tmp/line\nfeed"},
		{Start: 0x7ffd0c1f9000, End: 0x7ffd0c1fb000, Read: true, Exec: true, Path: "[vdso]"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for _, bad := range []string{"x", "2-1 r--p 0 0:0 0 ", "1-2 rwp 0 0:0 0 ", "1-2 r--p 0 0 0 ", "1-2 r--p 0 0:0 z ", "-1-2 r--p 0 0:0 0 "} {
		if m, err := ParseMaps(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is %+v", bad, m)
		}
	}
}

func FuzzParseMaps(f *testing.F) {
	for line := range strings.Lines(mapsText) {
		f.Add(line)
	}
	f.Add("1-2 rwxp 0 0:0 0 (deleted)")
	f.Fuzz(func(t *testing.T, text string) {
		maps, err := ParseMaps(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, m := range maps {
			if m.End < m.Start {
				t.Errorf("%q: %+v", text, m)
			}
		}
	})
}

func TestOwnMaps(t *testing.T) {
	maps, err := Maps(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	here := uint64(reflect.ValueOf(TestOwnMaps).Pointer())
	if !slices.ContainsFunc(maps, func(m Mapping) bool { return m.Exec && m.Start <= here && here < m.End }) {
		t.Errorf("no executable mapping holds this function at %#x", here)
	}
	if _, err := Maps(-1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no process: %v", err)
	}
}

func TestStartTime(t *testing.T) {
	for _, c := range []struct {
		stat string
		want uint64
	}{
		{"1 (a) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 9 9", 12345},
		{"1 (a) b (c) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 77", 77},
		{"1 (a", 0}, {"", 0}, {"1 (a) S 0", 0}, {"1 (a) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 x", 0},
	} {
		got, err := parseStartTime(c.stat)
		if got != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("%q: %d, %v", c.stat, got, err)
		}
	}
	if n, err := StartTime(os.Getpid()); err != nil || n == 0 {
		t.Errorf("own start time %d, %v", n, err)
	}
}

func TestDataRuns(t *testing.T) {
	f, err := os.CreateTemp("/dev/shm", "sys-test-")
	if err != nil {
		t.Skipf("needs a file system with holes: %v", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	const page = 4096
	if err := f.Truncate(100 * page); err != nil {
		t.Fatal(err)
	}
	for _, p := range []int64{3, 4, 50} {
		if _, err := f.WriteAt(make([]byte, page), p*page); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		off, end int64
		want     []Extent
	}{
		{0, 100 * page, []Extent{{3 * page, 2 * page}, {50 * page, page}}},
		{4 * page, 50 * page, []Extent{{4 * page, page}}},
		{0, 3 * page, nil},
		{60 * page, 100 * page, nil},
		{0, 3*page + 10, []Extent{{3 * page, 10}}},
		{200 * page, 300 * page, nil},
		{10, 10, nil},
	} {
		var got []Extent
		for e, err := range DataRuns(f, c.off, c.end) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%d to %d: %v, want %v", c.off, c.end, got, c.want)
		}
	}
	f.Close()
	for _, err := range DataRuns(f, 0, page) {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("closed file: %v", err)
		}
	}
}

func TestPidfd(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Skipf("needs sleep(1): %v", err)
	}
	fd, err := OpenPidfd(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if pid, err := PidfdPID(fd); err != nil || pid != cmd.Process.Pid {
		t.Errorf("PID %d, %v", pid, err)
	}
	if exited, err := PidfdExited(fd); err != nil || exited {
		t.Errorf("exited %v, %v", exited, err)
	}
	if over, err := PidfdOver(cmd.Process.Pid, fd); err != nil || over {
		t.Errorf("over %v, %v", over, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(time.Millisecond, cancel)
	if err := WaitPidfd(ctx, fd); !errors.Is(err, context.Canceled) {
		t.Errorf("wait for what runs on: %v", err)
	}
	if _, err := ExitInfo(fd); !errors.Is(err, ErrNotExited) && !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("exit status of what runs: %v", err)
	}
	if err := PidfdSignal(fd, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := WaitPidfd(t.Context(), fd); err != nil {
		t.Fatal(err)
	}
	if _, err := ExitInfo(fd); !errors.Is(err, ErrNotExited) && !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("exit status of a zombie: %v", err)
	}
	if over, err := PidfdOver(cmd.Process.Pid, fd); err != nil || !over {
		t.Errorf("a zombie is over: %v, %v", over, err)
	}
	_ = cmd.Wait() // reaps; the status is what ExitInfo is asked for
	if _, err := PidfdPID(fd); !errors.Is(err, unix.ESRCH) {
		t.Errorf("PID of what is gone: %v", err)
	}
	ws, err := ExitInfo(fd)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("kernel keeps no exit status: %v", err)
	}
	if err != nil || !ws.Signaled() || ws.Signal() != unix.SIGTERM {
		t.Errorf("exit status %#x, %v", ws, err)
	}
}

func TestPidfdOfSomethingElse(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := PidfdPID(int(f.Fd())); !errors.Is(err, unix.EBADF) {
		t.Errorf("a file: %v", err)
	}
	if _, err := OpenPidfd(1 << 30); !errors.Is(err, unix.ESRCH) {
		t.Errorf("no process: %v", err)
	}
}

func TestParseMeminfo(t *testing.T) {
	total, available, err := ParseMeminfo([]byte("MemTotal: 9 kB\nMemAvailable:    2048 kB\nHugePages_Total: 0\n"))
	if err != nil || total != 9<<10 || available != 2<<20 {
		t.Errorf("%d, %d, %v", total, available, err)
	}
	for _, bad := range []string{
		"", "MemTotal: 9 kB\nMemAvailable: x kB\n", "MemTotal: 9 kB\nMemAvailable: 1 MB\n", "MemAvailable: 1 kB\n", "MemTotal: 9 kB\n",
	} {
		if _, _, err := ParseMeminfo([]byte(bad)); err == nil {
			t.Errorf("ParseMeminfo(%q) succeeded", bad)
		}
	}
	if total, available, err := Memory(); err != nil || available <= 0 || available > total {
		t.Errorf("this machine: %d of %d, %v", available, total, err)
	}
}
