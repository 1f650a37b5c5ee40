// Package storage compares the files that a guest uses on two hosts.
package storage

import (
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
	Backing  bool   `json:"backing,omitempty"` // a disk's image stands on it
	// Elsewhere is a backing file that is no file: QEMU reaches it by itself, over
	// the network for instance.
	Elsewhere bool `json:"elsewhere,omitempty"`
}

// maxContent bounds a firmware, kernel or initrd in bytes.
const maxContent = 4 << 30

// ofContent looks at a file that both hosts have a copy of: a kernel, a firmware.
func ofContent(path string) (Facts, error) {
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
