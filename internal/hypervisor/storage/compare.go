package storage

import (
	"errors"
	"fmt"
	"os"

	"github.com/dustin/go-humanize"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// Seen is what came of looking at a file of a guest.
type Seen struct {
	Path  string
	Facts Facts
	Err   error // it cannot be used
}

// Content looks at a file that both hosts have a copy of.
func Content(path string) Seen {
	f, err := ofContent(path)
	return Seen{path, f, err}
}

// All are the facts of files, and an error that joins one for each that cannot
// be used.
func All(seen []Seen) ([]Facts, error) {
	facts := make([]Facts, len(seen))
	errs := make([]error, len(seen))
	for i, s := range seen {
		facts[i], errs[i] = s.Facts, s.Err
	}
	return facts, errors.Join(errs...)
}

// Compare says of each file what this host sees of it beside what the source
// sees.
func Compare(here []Seen, there []Facts) hypervisor.Checks {
	var c hypervisor.Checks
	for i, s := range here {
		switch {
		case i >= len(there):
			// More than one host has: of what is below a disk that is not the same,
			// there may be more or less.
		case errors.Is(s.Err, os.ErrNotExist):
			c.Fail("file "+s.Path, s.Err.Error()+" on this host", "make it reachable under this path")
		case s.Err != nil:
			c.Fail("file "+s.Path, s.Err.Error(), "")
		case s.Path != there[i].Path:
			c.Fail("file "+s.Path, fmt.Sprintf("the source describes the file %q in the place of %q", there[i].Path, s.Path), "")
		default:
			s.Facts.compare(&c, there[i])
		}
	}
	if len(here) != len(there) && c.OK() {
		c.Fail("files", fmt.Sprintf("the guest uses %d files here and %d at the source", len(here), len(there)), "see which files its disks stand on, with qemu-img info --backing-chain")
	}
	return c
}

// compare says what is different here from what the source sees.
func (here Facts) compare(c *hypervisor.Checks, there Facts) {
	const same = "both must see the same disk"
	fail := func(advice, format string, args ...any) {
		c.Fail(here.name(), here.Path+": "+fmt.Sprintf(format, args...), advice)
	}
	size := humanize.IBytes(uint64(max(here.Size, 0)))
	switch {
	case here.Elsewhere:
		c.Warn(here.name(), "QEMU reaches it by itself, so that it was not compared", "make sure that it is the same on both hosts")
	case !here.Shared && (here.Size != there.Size || here.Hash != there.Hash):
		fail("copy the file from there", "its content is not the source's")
	case !here.Shared:
		c.Pass(here.name(), "%s, the source's content", size)
	case here.Block != there.Block:
		fail(same, "it is %s here and %s at the source", kindOfFile(here), kindOfFile(there))
	case here.Size != there.Size && !here.grows():
		fail(same, "it has %d bytes here and %d at the source", here.Size, there.Size)
	case here.Inode != there.Inode:
		fail(same+", on shared storage", "it is another file here (inode %d) than at the source (inode %d)", here.Inode, there.Inode)
	case here.Identity != "" && there.Identity != "" && here.Identity != there.Identity:
		fail(same, "it is another device here (%s) than at the source (%s)", here.Identity, there.Identity)
	case here.Block && (here.Identity == "" || there.Identity == ""):
		c.Warn(here.name(), fmt.Sprintf("a block device of %s as at the source, but the kernel knows no name of it to compare", size),
			"make sure that "+here.Path+" is the same disk on both hosts")
	default:
		c.Pass(here.name(), "%s of %s, the same at the source", kindOfFile(here), size)
	}
}

// name is what the file is called in a check.
func (here Facts) name() string {
	if here.Backing {
		return "backing file " + here.Path
	}
	if here.Shared {
		return "disk " + here.Path
	}
	return "file " + here.Path
}

// grows says whether the file becomes larger as the guest writes, as images of
// other formats than raw do: it may have done so since the source looked.
func (here Facts) grows() bool { return !here.Block && here.Format != "" && here.Format != "raw" }

// kindOfFile says what a file is.
func kindOfFile(f Facts) string {
	if f.Block {
		return "a block device"
	}
	return "a file"
}
