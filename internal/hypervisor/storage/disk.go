package storage

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxLayers bounds the images that a disk stands on; one that stands on itself
// has no end.
const maxLayers = 256

// image is one that QEMU opens for a disk. Without a format QEMU looks for itself.
type image struct{ path, format string }

// Disk looks at a disk that both hosts must see, a file or a block device of an
// image format, raw if it is empty, and at all that its image stands on: a guest
// whose overlay is the same and whose base is not would read another disk. Only
// what a qcow2 image says of itself is followed.
func Disk(path, format string) []Seen {
	if format == "" {
		format = "raw"
	}
	var l layers
	l.add(image{path, format}, false)
	return l
}

// layers are a disk's images, each before those it stands on.
type layers []Seen

func (l *layers) add(img image, backing bool) {
	s, below := look(img)
	s.Facts.Backing = backing
	if s.Err == nil && len(below) > 0 && len(*l) >= maxLayers {
		s.Err, below = fmt.Errorf("%s: more than %d images stand on one another", img.path, maxLayers), nil
	}
	*l = append(*l, s)
	for _, b := range below {
		l.add(b, true)
	}
}

// look looks at an image, and says on which it stands.
func look(img image) (Seen, []image) {
	if img.elsewhere() {
		return Seen{Path: img.path, Facts: Facts{Path: img.path, Format: img.format, Elsewhere: true}}, nil
	}
	facts, below, err := open(img)
	return Seen{Path: img.path, Facts: facts, Err: err}, below
}

func open(img image) (_ Facts, below []image, err error) {
	f, err := openDisk(img.path)
	if err != nil {
		return Facts{}, nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	facts, err := diskFacts(f)
	if err != nil {
		return Facts{}, nil, err
	}
	facts.Path, facts.Format = img.path, img.format
	below, err = standsOn(f, img)
	return facts, below, err
}

// openDisk opens a file or a block device, and nothing else: an image can name any
// path, and to open some devices is to use them.
func openDisk(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFBLK {
		return nil, fmt.Errorf("%s is neither a file nor a block device", path)
	}
	opened, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(opened), path), nil
}

func diskFacts(f *os.File) (facts Facts, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return Facts{}, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		return Facts{Shared: true, Size: st.Size, Inode: st.Ino}, nil
	}
	facts = Facts{Shared: true, Block: true, Identity: blockIdentity(unix.Major(st.Rdev), unix.Minor(st.Rdev))}
	facts.Size, err = f.Seek(0, io.SeekEnd)
	return facts, err
}
