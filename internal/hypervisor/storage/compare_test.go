package storage

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

func TestCompare(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"kernel", "disk"} {
		if err := os.WriteFile(path(name), []byte("QFI\xfb, not more"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	kernel, disk := Content(path("kernel")), Disk(path("disk"), "")[0]
	facts, err := All([]Seen{kernel, disk})
	if err != nil {
		t.Fatal(err)
	}
	altered := func(f Facts, change func(*Facts)) []Facts { change(&f); return []Facts{f} }
	dm := Seen{Path: "/dev/d", Facts: Facts{Path: "/dev/d", Shared: true, Block: true, Size: 4096, Identity: "mpath-1"}}
	grown := disk
	grown.Facts.Format = "qcow2"
	for _, test := range []struct {
		name    string
		here    []Seen
		there   []Facts
		verdict hypervisor.Verdict
		want    string
	}{
		{"the same", []Seen{kernel, disk}, facts, hypervisor.Pass, "a file of 14 B, the same at the source"},
		{"fewer", []Seen{kernel}, facts, hypervisor.Fail, "1 files here and 2 at the source"},
		{"more", []Seen{kernel, disk}, facts[:1], hypervisor.Fail, "2 files here and 1 at the source"},
		{"which", []Seen{disk}, facts[:1], hypervisor.Fail, "in the place of"},
		{"content", []Seen{kernel}, altered(facts[0], func(f *Facts) { f.Hash++ }), hypervisor.Fail, "its content is not the source's"},
		{"size", []Seen{disk}, altered(facts[1], func(f *Facts) { f.Size++ }), hypervisor.Fail, "14 here and 15 at the source"},
		{"an image that grows", []Seen{grown}, altered(grown.Facts, func(f *Facts) { f.Size-- }), hypervisor.Pass, "the same at the source"},
		{"inode", []Seen{disk}, altered(facts[1], func(f *Facts) { f.Inode++ }), hypervisor.Fail, "another file here"},
		{"kind", []Seen{disk}, altered(facts[1], func(f *Facts) { f.Block = true }), hypervisor.Fail, "a file here and a block device at the source"},
		{"device", []Seen{dm}, altered(dm.Facts, func(f *Facts) { f.Identity = "mpath-2" }), hypervisor.Fail, "another device here"},
		{"device without a name", []Seen{dm}, altered(dm.Facts, func(f *Facts) { f.Identity = "" }), hypervisor.Warn, "no name of it to compare"},
		{"nothing", Disk(path("none"), ""), []Facts{{Path: path("none")}}, hypervisor.Fail, "on this host"},
		{"a FIFO as a disk", Disk(path("fifo"), ""), []Facts{{Path: path("fifo")}}, hypervisor.Fail, "neither a file"},
		{"a FIFO as a kernel", []Seen{Content(path("fifo"))}, []Facts{{Path: path("fifo")}}, hypervisor.Fail, "is no file"},
		{"format", Disk(path("kernel"), "qcow2"), []Facts{{Path: path("kernel")}}, hypervisor.Fail, "is no qcow2 image"},
	} {
		c := Compare(test.here, test.there)
		last := c[len(c)-1]
		text := strings.ReplaceAll(last.Detail, "bytes ", "")
		if last.Verdict != test.verdict || !strings.Contains(text, test.want) {
			t.Errorf("%s: %v %q, want %v %q", test.name, last.Verdict, last.Detail, test.verdict, test.want)
		}
		if c.OK() != (test.verdict != hypervisor.Fail) || last.Verdict == hypervisor.Warn && last.Advice == "" {
			t.Errorf("%s: %+v", test.name, c)
		}
	}
}
