package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"unicode"
)

// What of QEMU's docs/interop/qcow2.txt is needed to know which other files an
// image stands on.
const (
	qcow2Magic        = 0x514649fb // "QFI\xfb"
	qcow2Header2      = 72         // bytes of the header of version 2
	qcow2DataFile     = 1 << 2     // incompatible feature: the data is in another file
	qcow2MaxName      = 1023       // bytes
	qcow2MinCluster   = 9          // bits
	qcow2MaxCluster   = 21
	extensionEnd      = 0
	extensionFormat   = 0xe2792aca // of the backing file
	extensionDataFile = 0x44415441
)

// qcow2Header is the beginning of an image, of version 3.
type qcow2Header struct {
	Magic, Version       uint32
	BackingOffset        uint64
	BackingSize          uint32
	ClusterBits          uint32
	Size                 uint64
	Crypt, L1Size        uint32
	L1, Refcounts        uint64
	RefcountClusters     uint32
	Snapshots            uint32
	SnapshotsOffset      uint64
	Incompatible         uint64 // from here on not in version 2
	Compatible, Autowipe uint64
	RefcountOrder        uint32
	Length               uint32
}

// standsOn says which images an image needs beside itself: none if it is no
// qcow2 image. One that is to be and is not would show the guest another disk.
func standsOn(f io.ReaderAt, img image) ([]image, error) {
	if img.format != "qcow2" && img.format != "" {
		return nil, nil
	}
	var h qcow2Header
	err := binary.Read(io.NewSectionReader(f, 0, int64(binary.Size(h))), binary.BigEndian, &h)
	short := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !short {
		return nil, fmt.Errorf("read %s: %w", img.path, err)
	}
	if short || h.Magic != qcow2Magic {
		if img.format == "" {
			return nil, nil
		}
		return nil, fmt.Errorf("%s is no qcow2 image, as its definition says", img.path)
	}
	below, err := h.images(f, img.path)
	if err != nil {
		return nil, fmt.Errorf("%s: qcow2 header: %w", img.path, err)
	}
	return below, nil
}

// images are those that the image of this header stands on, its own data first.
func (h *qcow2Header) images(f io.ReaderAt, path string) (below []image, err error) {
	if h.Version < 3 {
		h.Length, h.Incompatible = qcow2Header2, 0
	}
	end := uint64(1) << h.ClusterBits
	if h.ClusterBits < qcow2MinCluster || h.ClusterBits > qcow2MaxCluster || h.BackingOffset > end || h.BackingSize > qcow2MaxName {
		return nil, fmt.Errorf("clusters of 2^%d bytes, a backing file's name of %d bytes at %d", h.ClusterBits, h.BackingSize, h.BackingOffset)
	}
	if h.BackingOffset != 0 {
		end = h.BackingOffset // the extensions come before the name
	}
	if h.Length < qcow2Header2 || uint64(h.Length) > end {
		return nil, fmt.Errorf("%d bytes, and what follows them ends at %d", h.Length, end)
	}
	extensions, err := readExtensions(io.NewSectionReader(f, int64(h.Length), int64(end)-int64(h.Length)))
	if err != nil {
		return nil, err
	}
	if h.Incompatible&qcow2DataFile != 0 {
		name, ok := extensions[extensionDataFile]
		if !ok {
			return nil, errors.New("its data is in another file, which it does not name")
		}
		if below, err = stand(below, path, name, "raw"); err != nil {
			return nil, err
		}
	}
	if h.BackingOffset == 0 || h.BackingSize == 0 {
		return below, nil
	}
	name := make([]byte, h.BackingSize)
	if _, err := io.ReadFull(io.NewSectionReader(f, int64(h.BackingOffset), int64(h.BackingSize)), name); err != nil {
		return nil, fmt.Errorf("name of the backing file: %w", err)
	}
	return stand(below, path, string(name), extensions[extensionFormat])
}

// stand adds an image that the one at a path stands on. Its name is an operator's
// to read.
func stand(below []image, path, name, format string) ([]image, error) {
	if strings.ContainsFunc(name, unicode.IsControl) {
		return nil, fmt.Errorf("it names a file %q", name)
	}
	return append(below, image{resolve(path, name), format}), nil
}

// readExtensions reads the header's extensions, by type. They cannot be larger
// than the section that they are in.
func readExtensions(r *io.SectionReader) (map[uint32]string, error) {
	found := make(map[uint32]string)
	for left := r.Size(); ; {
		var e struct{ Type, Length uint32 }
		err := binary.Read(r, binary.BigEndian, &e)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || err == nil && e.Type == extensionEnd {
			return found, nil
		}
		if err != nil {
			return nil, fmt.Errorf("extensions: %w", err)
		}
		padded := (int64(e.Length) + 7) &^ 7
		if left -= 8 + padded; left < 0 {
			return nil, fmt.Errorf("extension %#x of %d bytes does not fit in", e.Type, e.Length)
		}
		content := make([]byte, padded)
		if _, err := io.ReadFull(r, content); err != nil {
			return nil, fmt.Errorf("extension %#x: %w", e.Type, err)
		}
		found[e.Type] = string(content[:e.Length])
	}
}

// protocol is how a name begins that is no path.
var protocol = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]*:`)

// elsewhere says whether QEMU reaches an image by other means than a path.
func (img image) elsewhere() bool { return protocol.MatchString(img.path) }

// resolve is what the image at a path means by a name: a path, or a description
// of where QEMU finds it. What is in one of those is left out, since there may be
// passwords in it.
func resolve(path, name string) string {
	if plain, is := strings.CutPrefix(name, "file:"); is {
		name = plain
	}
	if scheme := protocol.FindString(name); scheme != "" {
		return scheme + "…"
	}
	if strings.HasPrefix(name, "/") {
		return name
	}
	// As QEMU does: a cleaned path would be another where a folder is a link.
	return path[:strings.LastIndexByte(path, '/')+1] + name
}
