package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"
)

// pageSize of this host in bytes.
var pageSize = os.Getpagesize()

// fileFacts is what a host sees of a file that a guest uses.
type fileFacts struct {
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

// gatherFiles looks at every file of a guest, in a fixed order. Its error
// joins one for each file that cannot be used.
func gatherFiles(def *Definition) ([]fileFacts, error) {
	var facts []fileFacts
	var errs []error
	for _, path := range []string{def.Firmware, def.Kernel, def.Initrd} {
		if path == "" {
			continue
		}
		f, err := contentFacts(path)
		errs = append(errs, err)
		facts = append(facts, f)
	}
	for i := range def.Disks {
		f, err := diskFacts(&def.Disks[i])
		errs = append(errs, err)
		facts = append(facts, f)
	}
	return facts, errors.Join(errs...)
}

// maxContent bounds a firmware, kernel or initrd in bytes.
const maxContent = 4 << 30

func contentFacts(path string) (fileFacts, error) {
	f, err := os.Open(path)
	if err != nil {
		return fileFacts{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fileFacts{}, err
	}
	if !info.Mode().IsRegular() {
		return fileFacts{}, fmt.Errorf("%s is no file", path)
	}
	if info.Size() > maxContent {
		return fileFacts{}, fmt.Errorf("%s has %s, more than a guest can boot from", path, Size(info.Size()))
	}
	sum := xxhash.New()
	n, err := io.Copy(sum, f)
	if err != nil {
		return fileFacts{}, fmt.Errorf("read %s: %w", path, err)
	}
	return fileFacts{Path: path, Size: n, Hash: sum.Sum64()}, nil
}

func diskFacts(d *Disk) (_ fileFacts, err error) {
	// O_NONBLOCK: a FIFO must not hold us up.
	fd, err := unix.Open(d.Path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fileFacts{}, &os.PathError{Op: "open", Path: d.Path, Err: err}
	}
	f := os.NewFile(uintptr(fd), d.Path)
	defer func() { err = errors.Join(err, f.Close()) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileFacts{}, &os.PathError{Op: "stat", Path: d.Path, Err: err}
	}
	facts := fileFacts{Path: d.Path, Shared: true, Format: d.Format, Size: st.Size}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		facts.Inode = st.Ino
	case unix.S_IFBLK:
		facts.Block = true
		if facts.Size, err = f.Seek(0, io.SeekEnd); err != nil {
			return fileFacts{}, err
		}
		facts.Identity = blockIdentity(unix.Major(st.Rdev), unix.Minor(st.Rdev))
	default:
		return fileFacts{}, fmt.Errorf("%s is neither a file nor a block device", d.Path)
	}
	return facts, checkFormat(f, d)
}

// checkFormat looks for qcow2's magic: a wrong format would show the guest
// another disk.
func checkFormat(f *os.File, d *Disk) error {
	var magic [4]byte
	_, err := f.ReadAt(magic[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read %s: %w", d.Path, err)
	}
	const qcow = 0x514649fb
	if d.Format == "qcow2" && binary.BigEndian.Uint32(magic[:]) != qcow {
		return fmt.Errorf("%s is no qcow2 image, as its definition says", d.Path)
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

// compare says what is different here from what the source sees.
func (here fileFacts) compare(there fileFacts) []string {
	var reasons []string
	say := func(format string, args ...any) {
		reasons = append(reasons, here.Path+": "+fmt.Sprintf(format, args...))
	}
	if !here.Shared {
		if here.Size != there.Size || here.Hash != there.Hash {
			say("its content is not the source's; copy the file from there")
		}
		return reasons
	}
	switch {
	case here.Block != there.Block:
		say("it is %s here and %s at the source; both must see the same disk", kindOfFile(here), kindOfFile(there))
	case here.Size != there.Size:
		say("it has %d bytes here and %d at the source; both must see the same disk", here.Size, there.Size)
	case here.Inode != there.Inode:
		say("it is another file here (inode %d) than at the source (inode %d); both must see the same disk, on shared storage", here.Inode, there.Inode)
	case here.Identity != "" && there.Identity != "" && here.Identity != there.Identity:
		say("it is another device here (%s) than at the source (%s); both must see the same disk", here.Identity, there.Identity)
	}
	return reasons
}

func kindOfFile(f fileFacts) string {
	if f.Block {
		return "a block device"
	}
	return "a file"
}
