package announce

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// TapFDs finds the descriptors by which process pid has the tap open, one for
// each queue, ascending; none is an error. They are numbers in that process:
// pidfd_getfd(2) duplicates them into this one.
func TapFDs(pid int, tap string) ([]int, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fdinfo")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("announce: find tap %s in process %d: %w", tap, pid, err)
	}
	var fds []int
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		is, err := isTap(filepath.Join(dir, e.Name()), tap)
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("announce: find tap %s in process %d: %w", tap, pid, err)
		}
		if is {
			fds = append(fds, fd)
		}
	}
	if len(fds) == 0 {
		return nil, fmt.Errorf("announce: process %d does not have tap %s open", pid, tap)
	}
	slices.Sort(fds)
	return fds, nil
}

// isTap looks for the line "iff:\tNAME" that the tun driver writes.
func isTap(path, tap string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close() // read only
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if name, ok := strings.CutPrefix(lines.Text(), "iff:"); ok {
			return strings.TrimSpace(name) == tap, nil
		}
	}
	return false, lines.Err()
}

// readQueue takes what is in a tap's queue, at most limit frames, and returns
// from the Ethernet type on those that another machine sent to the guest alone.
func readQueue(fd int, nic NIC, limit int) ([][]byte, error) {
	header, err := tapHeader(fd, nic.Tap)
	if err != nil {
		return nil, err
	}
	// QEMU's own descriptors are non-blocking, and this flag is shared.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("descriptor of %s: %w", nic.Tap, err)
	}
	var frames [][]byte
	b := make([]byte, header+largestFrame)
	for range limit {
		n, err := unix.Read(fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return frames, nil
		case err != nil:
			return nil, fmt.Errorf("read %s: %w", nic.Tap, err)
		case n < header+offIP:
			continue
		}
		eth := b[header:n]
		if bytes.Equal(eth[:offSource], nic.MAC) && !bytes.Equal(eth[offSource:offType], nic.MAC) {
			frames = append(frames, bytes.Clone(eth[offType:]))
		}
	}
	return frames, nil
}

// tapHeader is how many bytes precede a frame that is read from the tap.
func tapHeader(fd int, tap string) (int, error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return 0, fmt.Errorf("TUNGETIFF: %w", err)
	}
	flags, header := ifr.Uint16(), 0
	if flags&unix.IFF_TAP == 0 || ifr.Name() != tap {
		return 0, fmt.Errorf("the descriptor is of %s, not of the tap %s", ifr.Name(), tap)
	}
	if flags&unix.IFF_NO_PI == 0 {
		header = 4 // struct tun_pi
	}
	if flags&unix.IFF_VNET_HDR != 0 {
		size, err := unix.IoctlGetUint32(fd, unix.TUNGETVNETHDRSZ)
		if err != nil {
			return 0, fmt.Errorf("TUNGETVNETHDRSZ: %w", err)
		}
		header += int(size)
	}
	return header, nil
}
