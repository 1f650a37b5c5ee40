package directio

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/testenv"
)

// slowDisk is a file, on a file system of the test's own, whose reads take the
// time that the test wants. The kernel pins the reader's pages before a read
// gets here and fills them once it has been answered.
type slowDisk struct {
	fs.Inode
	path string

	mu      sync.Mutex
	content []byte
	latency time.Duration       // of reads that come from now on
	slowed  uint64              // number of the last open file whose reads take it
	opened  uint64              // number of the last open file
	release chan struct{}       // closed when those under way are to land at once
	reads   map[uint64]struct{} // under way, by their numbers
	newest  uint64              // number of the last read
	changed chan struct{}       // closed when reads changes
}

var (
	_ fs.NodeOnAdder   = (*diskFolder)(nil)
	_ fs.NodeGetattrer = (*slowDisk)(nil)
	_ fs.NodeSetattrer = (*slowDisk)(nil)
	_ fs.NodeOpener    = (*slowDisk)(nil)
	_ fs.NodeReader    = (*slowDisk)(nil)
	_ fs.NodeWriter    = (*slowDisk)(nil)
	_ fs.NodeFsyncer   = (*slowDisk)(nil)
)

// newSlowDisk mounts a disk of so many bytes until the test ends. Reads take no
// time yet.
func newSlowDisk(t *testing.T, size int) *slowDisk {
	t.Helper()
	testenv.Need(t, "FUSE", probeFUSE())
	dir := t.TempDir()
	d := &slowDisk{
		path: filepath.Join(dir, "disk"), content: make([]byte, size),
		release: make(chan struct{}), reads: make(map[uint64]struct{}), changed: make(chan struct{}),
	}
	server, err := fs.Mount(dir, &diskFolder{disk: d}, &fs.Options{MountOptions: fuse.MountOptions{
		DirectMountStrict: true, FsName: "slowdisk", DisableXAttrs: true,
	}})
	if err != nil {
		t.Fatalf("mount %s: %v", dir, err)
	}
	t.Cleanup(func() {
		d.landAll()
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return d
}

// probeFUSE says whether this machine has FUSE at all.
func probeFUSE() error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	switch {
	case err == nil:
		return f.Close()
	case os.IsNotExist(err):
		return fmt.Errorf("%w: %w", unix.ENOTSUP, err)
	}
	return err
}

// diskFolder is the root of the file system: a folder with the disk in it.
type diskFolder struct {
	fs.Inode
	disk *slowDisk
}

func (f *diskFolder) OnAdd(ctx context.Context) {
	f.AddChild("disk", f.NewPersistentInode(ctx, f.disk, fs.StableAttr{Mode: syscall.S_IFREG, Ino: 2}), true)
}

func (d *slowDisk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = syscall.S_IFREG|0o600, uint64(len(d.content))
	return 0
}

// Setattr accepts what it need not remember: times.
func (d *slowDisk) Setattr(ctx context.Context, h fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && size != uint64(len(d.content)) {
		return syscall.EPERM
	}
	return d.Getattr(ctx, h, out)
}

// openFile is the number of an open file.
type openFile uint64

func (d *slowDisk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opened++
	return openFile(d.opened), fuse.FOPEN_DIRECT_IO, 0
}

func (d *slowDisk) Read(_ context.Context, h fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	file, ok := h.(openFile)
	if !ok {
		return nil, syscall.EBADF
	}
	id, latency, release := d.begin(file)
	defer d.end(id)
	if latency > 0 {
		timer := time.NewTimer(latency)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-release:
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if off >= int64(len(d.content)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(dest[:copy(dest, d.content[off:])]), 0
}

func (d *slowDisk) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off+int64(len(data)) > int64(len(d.content)) {
		return 0, syscall.ENOSPC
	}
	return uint32(copy(d.content[off:], data)), 0
}

// Fsync has nothing to do: what is written is in place.
func (d *slowDisk) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }

func (d *slowDisk) begin(file openFile) (uint64, time.Duration, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if uint64(file) > d.slowed {
		return 0, 0, nil
	}
	d.newest++
	d.reads[d.newest] = struct{}{}
	d.notify()
	return d.newest, d.latency, d.release
}

func (d *slowDisk) end(id uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.reads, id)
	d.notify()
}

func (d *slowDisk) notify() {
	close(d.changed)
	d.changed = make(chan struct{})
}

// slow sets how long reads take from now on, for those who have opened the disk
// by now: the other host looks at it in the meantime.
func (d *slowDisk) slow(latency time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.latency, d.slowed = latency, d.opened
}

// landAll ends the reads that are under way.
func (d *slowDisk) landAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.release)
	d.release = make(chan struct{})
}

// underWay returns the numbers of the slow reads that are under way.
func (d *slowDisk) underWay() []uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.reads))
}

// await waits until a slow read is under way.
func (d *slowDisk) await(ctx context.Context) error {
	for {
		d.mu.Lock()
		n, changed := len(d.reads), d.changed
		d.mu.Unlock()
		if n > 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("nothing is read from the disk: %w", ctx.Err())
		}
	}
}
