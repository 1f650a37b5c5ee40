package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/testenv"
)

// makeImage has qemu-img make an image in a folder.
func makeImage(t *testing.T, dir string, args ...string) {
	t.Helper()
	create := exec.Command(testenv.NeedTool(t, "qemu-img"), append([]string{"create", "-q", "-f", "qcow2"}, args...)...)
	create.Dir = dir
	if out, err := create.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// forgetFormat takes out of an image what the one is that it stands on: QEMU looks
// for itself then. It makes none like this any more.
func forgetFormat(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	known := binary.BigEndian.AppendUint32(nil, extensionFormat)
	if !bytes.Contains(b, known) {
		t.Fatalf("%s has no extension %#x", path, extensionFormat)
	}
	if err := os.WriteFile(path, bytes.Replace(b, known, []byte("none"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
}

// paths are those of what was seen, below a folder.
func paths(t *testing.T, dir string, seen []Seen) (all []string) {
	t.Helper()
	for i, s := range seen {
		if s.Err != nil {
			t.Errorf("%s: %v", s.Path, s.Err)
		}
		if s.Facts.Path != s.Path || s.Facts.Backing != (i > 0) {
			t.Errorf("%+v", s)
		}
		all = append(all, strings.TrimPrefix(s.Path, dir+"/"))
	}
	return all
}

// A disk is all images that its own stands on, as qemu-img makes them.
func TestDiskStandsOn(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "base"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "base", "raw"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	makeImage(t, dir, "-b", "raw", "-F", "raw", "base/middle")
	makeImage(t, dir, "-b", filepath.Join(dir, "base", "middle"), "-F", "qcow2", "top")
	makeImage(t, dir, "-b", "base/middle", "-F", "qcow2", "probed")
	forgetFormat(t, filepath.Join(dir, "probed"))
	makeImage(t, dir, "-o", "compat=0.10", "-b", "top", "-F", "qcow2", "old")
	makeImage(t, dir, "-o", "data_file=data,data_file_raw=on", "apart", "1M")
	makeImage(t, dir, "-u", "-b", "nbd://host/secret", "-F", "raw", "remote", "1M")
	makeImage(t, dir, "alone", "1M")
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "far"), 0o700), os.Symlink(filepath.Join(dir, "far"), filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	makeImage(t, dir, "-b", "../base/raw", "-F", "raw", "link/up")
	for _, test := range []struct {
		top, format string
		want        []string
	}{
		{"alone", "qcow2", []string{"alone"}},
		{"base/middle", "qcow2", []string{"base/middle", "base/raw"}},
		{"top", "qcow2", []string{"top", "base/middle", "base/raw"}},
		{"probed", "qcow2", []string{"probed", "base/middle", "base/raw"}},
		{"old", "qcow2", []string{"old", "top", "base/middle", "base/raw"}},
		{"link/up", "qcow2", []string{"link/up", "link/../base/raw"}},
		{"apart", "qcow2", []string{"apart", "data"}},
		{"remote", "qcow2", []string{"remote", "nbd:…"}},
		// What looks like an image in a raw disk is the guest's own.
		{"top", "raw", []string{"top"}},
		{"top", "", []string{"top"}},
	} {
		if got := paths(t, dir, Disk(filepath.Join(dir, test.top), test.format)); !slices.Equal(got, test.want) {
			t.Errorf("%s as %q stands on %q, want %q", test.top, test.format, got, test.want)
		}
	}
}

// A header that would have no end is refused, whatever it says of itself.
func TestStandsOnTooMuch(t *testing.T) {
	for what, change := range map[string]func(*qcow2Header){
		"a long header":     func(h *qcow2Header) { h.Length = 112 },
		"a short header":    func(h *qcow2Header) { h.Length = 8 },
		"large clusters":    func(h *qcow2Header) { h.ClusterBits = 40 },
		"a name far behind": func(h *qcow2Header) { h.BackingOffset = 1 << 40 },
		"a long name":       func(h *qcow2Header) { h.BackingSize = 1 << 20 },
	} {
		h := qcow2Header{Magic: qcow2Magic, Version: 3, BackingOffset: 104, BackingSize: 4, ClusterBits: 16, Length: 104}
		change(&h)
		var b bytes.Buffer
		if err := binary.Write(&b, binary.BigEndian, h); err != nil {
			t.Fatal(err)
		}
		b.Write(make([]byte, 1<<17))
		if below, err := standsOn(bytes.NewReader(b.Bytes()), image{"/images/top", "qcow2"}); err == nil || !strings.Contains(err.Error(), "qcow2 header") {
			t.Errorf("%s: %q, %v", what, below, err)
		}
	}
	huge := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, extensionFormat), 1<<30)
	if found, err := readExtensions(io.NewSectionReader(bytes.NewReader(append(huge, make([]byte, 64)...)), 0, 72)); err == nil {
		t.Errorf("an extension larger than its image: %v", found)
	}
}

// A name that would write over what an operator reads is refused.
func TestStandsOnOddName(t *testing.T) {
	dir := t.TempDir()
	makeImage(t, dir, "-u", "-b", "base\x1b[2J", "-F", "raw", "odd", "1M")
	if seen := Disk(filepath.Join(dir, "odd"), "qcow2"); len(seen) != 1 || seen[0].Err == nil || strings.ContainsRune(seen[0].Err.Error(), 0x1b) {
		t.Errorf("%+v", seen)
	}
}

// Another file below a disk is found, and one that is missing, and one that stands
// on itself.
func TestDiskOnAnother(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	makeImage(t, dir, "-b", "base", "-F", "raw", "top")
	there, err := All(Disk(top, "qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	if c := Compare(Disk(top, "qcow2"), there); !c.OK() || len(c) != 2 {
		t.Errorf("the same: %+v", c)
	}
	copied := filepath.Join(dir, "copy") // made while the first is there, so of another inode
	if err := os.WriteFile(copied, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(copied, base); err != nil {
		t.Fatal(err)
	}
	c := Compare(Disk(top, "qcow2"), there)
	if last := c[len(c)-1]; c.OK() || last.Name != "backing file "+base || !strings.Contains(last.Detail, "another file here") {
		t.Errorf("a copy: %+v", c)
	}
	if err := os.Remove(base); err != nil {
		t.Fatal(err)
	}
	c = Compare(Disk(top, "qcow2"), there)
	if last := c[len(c)-1]; c.OK() || !strings.Contains(last.Detail, "no such file or directory on this host") {
		t.Errorf("none: %+v", c)
	}
	makeImage(t, dir, "-u", "-b", "under", "-F", "qcow2", "top", "1M")
	makeImage(t, dir, "-u", "-b", "top", "-F", "qcow2", "under", "1M")
	if _, err := All(Disk(top, "qcow2")); err == nil || !strings.Contains(err.Error(), "stand on one another") {
		t.Errorf("on itself: %v", err)
	}
	makeImage(t, dir, "-u", "-b", "nbd://host/secret", "-F", "raw", "top", "1M")
	if there, err = All(Disk(top, "qcow2")); err != nil {
		t.Fatal(err)
	}
	c = Compare(Disk(top, "qcow2"), there)
	if last := c[len(c)-1]; !c.OK() || last.Verdict != hypervisor.Warn || strings.Contains(last.Name+last.Detail, "secret") {
		t.Errorf("over the network: %+v", c)
	}
}

// An image says where its other files are in whatever bytes it has.
func FuzzStandsOn(f *testing.F) {
	var b bytes.Buffer
	h := qcow2Header{Magic: qcow2Magic, Version: 3, BackingOffset: 128, BackingSize: 4, ClusterBits: 16, Incompatible: qcow2DataFile, Length: 104}
	for _, part := range []any{h, uint32(extensionDataFile), uint32(4), [8]byte{'d', 'a', 't', 'a'}, uint64(extensionEnd), [4]byte{'b', 'a', 's', 'e'}} {
		if err := binary.Write(&b, binary.BigEndian, part); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(b.Bytes())
	// The header is longer than where it says that the name is, and what follows
	// would have no end.
	long := bytes.Clone(b.Bytes())
	binary.BigEndian.PutUint64(long[8:], 104)
	binary.BigEndian.PutUint32(long[100:], 112)
	f.Add(long)
	f.Fuzz(func(t *testing.T, header []byte) {
		below, err := standsOn(bytes.NewReader(header), image{"/images/top", "qcow2"})
		if err != nil && len(below) > 0 || len(below) > 2 {
			t.Errorf("%q and %v", below, err)
		}
		for _, b := range below {
			if !filepath.IsAbs(b.path) && !b.elsewhere() {
				t.Errorf("%q is neither a path nor elsewhere", b.path)
			}
		}
	})
}
