package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/migrate"
)

// Guest is a guest of this host as the source of a migration. It holds the
// guest for one operation until Close.
type Guest struct {
	v     *vm
	inst  *instance
	pidfd int
	file  *os.File // the memory file
	done  func()
	once  sync.Once

	stream *stateStream // from Suspend on
	told   bool         // QEMU was told to complete its migration
	caught *nics.Caught // from Suspend to Resume or Close
}

var _ migrate.Guest = (*Guest)(nil)

// Source takes a guest for a migration away from this host: one that runs, or
// one whose earlier migration was interrupted and that Info calls suspended,
// so that it can be resumed or released. The caller closes it.
func (d *Driver) Source(name string) (*Guest, error) {
	v, err := d.lookup(name)
	if err != nil {
		return nil, err
	}
	done, err := v.begin("migration", hypervisor.StateRunning, hypervisor.StatePaused, hypervisor.StateMigrating)
	if err != nil {
		return nil, err
	}
	g, err := v.source(done)
	if err != nil {
		done()
		return nil, fmt.Errorf("migrate guest %s: %w", name, err)
	}
	return g, nil
}

func (v *vm) source(done func()) (*Guest, error) {
	v.mu.Lock()
	inst := v.inst
	v.mu.Unlock()
	if inst == nil {
		return nil, &hypervisor.StateError{Guest: v.def.Name, Operation: "migrate", State: hypervisor.StateStopped}
	}
	pidfd, err := inst.proc.duplicate()
	if err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", inst.proc.id.PID, err)
	}
	file, err := os.OpenFile(v.files.memory, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("memory file: %w", err), unix.Close(pidfd))
	}
	return &Guest{v: v, inst: inst, pidfd: pidfd, file: file, done: done}, nil
}

// Close gives the guest back: any other operation may have it now. It neither
// resumes nor releases the guest.
func (g *Guest) Close() error {
	var err error
	g.once.Do(func() {
		if g.stream != nil {
			err = g.stream.close()
		}
		err = errors.Join(err, g.uncatch(), g.file.Close(), unix.Close(g.pidfd))
		g.done()
	})
	return err
}

// Name identifies the guest.
func (g *Guest) Name() string { return g.v.def.Name }

// UUID identifies the guest.
func (g *Guest) UUID() string { return g.v.def.UUID }

// Prepared is told nothing: a QEMU that waits has nothing to say.
func (g *Guest) Prepared([]byte) error { return nil }

// Process is QEMU. The descriptor is valid until Close.
func (g *Guest) Process() migrate.Process {
	return migrate.Process{PID: g.inst.proc.id.PID, PIDFD: g.pidfd}
}

// Memory finds where QEMU has mapped the guest's RAM.
func (g *Guest) Memory(context.Context) ([]migrate.Memory, error) {
	addr, err := findMapping(g.inst.proc.id.PID, g.file, int64(g.v.def.Memory))
	if err != nil {
		return nil, fmt.Errorf("memory of guest %s: %w", g.Name(), err)
	}
	return []migrate.Memory{{Name: memoryBackend, File: g.file, Size: int64(g.v.def.Memory), Addr: addr}}, nil
}

// findMapping returns where a process maps the whole of a file, in one piece
// of its address space even if the kernel keeps that as several.
func findMapping(pid int, file *os.File, size int64) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return 0, fmt.Errorf("%s: %w", file.Name(), err)
	}
	if st.Size != size {
		return 0, fmt.Errorf("%s has %d bytes, not the %d of the definition", file.Name(), st.Size, size)
	}
	maps, err := sys.Maps(pid)
	if err != nil {
		return 0, err
	}
	var start, end uint64
	for _, m := range maps {
		same := m.Inode == st.Ino && m.DevMajor == unix.Major(st.Dev) && m.DevMinor == unix.Minor(st.Dev)
		switch {
		case !same:
		case !m.Shared:
			return 0, fmt.Errorf("process %d maps %s privately", pid, file.Name())
		case end == 0 && m.Offset == 0:
			start, end = m.Start, m.End
		case end == 0 || m.Start != end || m.Offset != end-start:
			return 0, fmt.Errorf("process %d maps %s in pieces that do not follow one another", pid, file.Name())
		default:
			end = m.End
		}
	}
	if end-start != uint64(size) {
		return 0, fmt.Errorf("process %d maps %d bytes of %s, not its %d", pid, end-start, file.Name(), size)
	}
	return start, nil
}

// Drain waits until the block I/O that is in flight has landed. An empty
// transaction makes QEMU do just that, and the guest runs on.
func (g *Guest) Drain(ctx context.Context) error {
	err := g.v.monitor(g.inst).run(ctx, "transaction", map[string]any{"actions": []any{}}, nil)
	if err != nil {
		return fmt.Errorf("drain the block I/O of guest %s: %w", g.Name(), err)
	}
	return nil
}
