// Package storage compares the files that a guest uses on two hosts.
package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// Facts is what a host sees of a file that a guest uses.
type Facts struct {
	Path string `json:"path"`
	// Shared says that both hosts must see the very same file (a disk), not
	// just the same content (a kernel).
	Shared bool   `json:"shared"`
	Block  bool   `json:"block"` // a block device
	Size   int64  `json:"size"`  // bytes
	Inode  uint64 `json:"inode,omitempty"`
	// Identity is what the kernel knows of a block device: WWID or device
	// mapper UUID; empty if it knows none.
	Identity string `json:"identity,omitempty"`
	Hash     uint64 `json:"hash,omitempty"` // xxhash of the content, of files that are not shared
	Format   string `json:"format,omitempty"`
}

// maxContent bounds a firmware, kernel or initrd in bytes.
const maxContent = 4 << 30

// OfContent looks at a file that both hosts have a copy of: a kernel, a firmware.
func OfContent(path string) (Facts, error) {
	// O_NONBLOCK: a FIFO must not hold us up.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return Facts{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Facts{}, err
	}
	if !info.Mode().IsRegular() {
		return Facts{}, fmt.Errorf("%s is no file", path)
	}
	if info.Size() > maxContent {
		return Facts{}, fmt.Errorf("%s has %s, more than a guest can boot from", path, humanize.IBytes(uint64(info.Size())))
	}
	sum := xxhash.New()
	n, err := io.Copy(sum, f)
	if err != nil {
		return Facts{}, fmt.Errorf("read %s: %w", path, err)
	}
	return Facts{Path: path, Size: n, Hash: sum.Sum64()}, nil
}

// OfDisk looks at a disk that both hosts must see: a file or a block device, of
// an image format, or empty for any.
func OfDisk(path, format string) (_ Facts, err error) {
	// O_NONBLOCK: a FIFO must not hold us up.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return Facts{}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() { err = errors.Join(err, f.Close()) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Facts{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	facts := Facts{Path: path, Shared: true, Format: format, Size: st.Size}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		facts.Inode = st.Ino
	case unix.S_IFBLK:
		facts.Block = true
		if facts.Size, err = f.Seek(0, io.SeekEnd); err != nil {
			return Facts{}, err
		}
		facts.Identity = blockIdentity(unix.Major(st.Rdev), unix.Minor(st.Rdev))
	default:
		return Facts{}, fmt.Errorf("%s is neither a file nor a block device", path)
	}
	return facts, checkFormat(f, path, format)
}

// checkFormat looks for qcow2's magic: a wrong format would show the guest
// another disk.
func checkFormat(f *os.File, path, format string) error {
	var magic [4]byte
	_, err := f.ReadAt(magic[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read %s: %w", path, err)
	}
	const qcow = 0x514649fb
	if format == "qcow2" && binary.BigEndian.Uint32(magic[:]) != qcow {
		return fmt.Errorf("%s is no qcow2 image, as its definition says", path)
	}
	return nil
}

// blockIdentity is a name of the device that does not depend on the host.
func blockIdentity(major, minor uint32) string {
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", major, minor)
	for _, name := range []string{"dm/uuid", "wwid", "device/wwid", "md/uuid"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			if id := strings.TrimSpace(string(b)); id != "" {
				return id
			}
		}
	}
	return ""
}
