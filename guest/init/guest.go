package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/workload"
)

// guest is everything that runs in this machine.
type guest struct {
	settings control.Settings
	bootID   string
	started  time.Time
	problems workload.Problems
	memory   *workload.Memory
	disk     *workload.Disk // nil without a device
	clock    *workload.Clock
	net      *workload.Net
	off      context.CancelFunc // powers the guest off
}

// reserve is what is left to the kernel and to this program when the working
// set is at its largest, in bytes.
const reserve = 64 << 20

func newGuest(s control.Settings, started time.Time) (*guest, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	g := &guest{settings: s, bootID: strings.TrimSpace(string(id)), started: started}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, fmt.Errorf("sysinfo: %w", err)
	}
	// One page in 512 goes to the count of writes of each page, and one more to
	// page tables.
	room := (int64(info.Freeram) - reserve - s.Static) / 256 * 255
	if g.memory, err = workload.NewMemory(s.Memory, max(room, 0), s.Static, s.Seed, &g.problems); err != nil {
		return nil, err
	}
	if s.Device != "" {
		if err := waitFor("block device "+s.Device, func() bool {
			_, err := os.Stat(s.Device)
			return err == nil
		}); err != nil {
			return nil, err
		}
		if g.disk, err = workload.OpenDisk(s.Device, s.Disk, s.Seed, &g.problems); err != nil {
			return nil, err
		}
	}
	if g.clock, err = workload.NewClock(s.Tick); err != nil {
		return nil, err
	}
	g.net = workload.NewNet(g.bootID, started)
	return g, nil
}

// serve runs all of it until the guest is told to power off.
func (g *guest) serve(ctx context.Context, console *console) error {
	ctx, g.off = context.WithCancel(ctx)
	defer g.off()
	defer context.AfterFunc(ctx, watchEnd)()
	group, ctx := errgroup.WithContext(ctx)
	plain := func(f func(context.Context)) {
		group.Go(func() error { f(ctx); return nil })
	}
	plain(background(g.memory.Write))
	plain(background(g.memory.Check))
	plain(g.clock.Run)
	if g.disk != nil {
		plain(g.disk.Write)
		plain(g.disk.Read)
	}
	if err := g.listen(ctx, group); err != nil {
		return err
	}
	group.Go(func() error { return console.serve(ctx, g) })
	return group.Wait()
}

// endPatience is how long the services may take to end when they are told to.
const endPatience = 20 * time.Second

// watchEnd says on the console what keeps a guest from powering off.
func watchEnd() {
	time.AfterFunc(endPatience, func() {
		fmt.Fprintf(os.Stderr, "init: not powered off within %v:\n", endPatience)
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2) // there is no other way to tell
	})
}

// background gives f a thread of its own that the kernel runs only when no other
// wants to run, so that services answer beside a writer that never rests.
func background(f func(context.Context)) func(context.Context) {
	return func(ctx context.Context) {
		runtime.LockOSThread() // and never unlocked: nobody else is to be that slow
		// Lowering one's own priority is always allowed.
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 19)
		f(ctx)
	}
}

// listen starts the services on the network.
func (g *guest) listen(ctx context.Context, group *errgroup.Group) error {
	numbered, err := net.Listen("tcp", ":"+strconv.Itoa(control.NumberedPort))
	if err != nil {
		return err
	}
	lines, err := net.Listen("tcp", ":"+strconv.Itoa(control.ControlPort))
	if err != nil {
		return err
	}
	echo, err := net.ListenUDP("udp", &net.UDPAddr{Port: control.EchoPort})
	if err != nil {
		return err
	}
	group.Go(func() error { return g.net.Number(ctx, numbered) })
	group.Go(func() error { return g.net.Echo(ctx, echo) })
	group.Go(func() error {
		return workload.Serve(ctx, lines, func(c net.Conn) {
			// The last reply is to leave before the guest powers off.
			if tcp, ok := c.(*net.TCPConn); ok {
				_ = tcp.SetLinger(2)
			}
			g.converse(ctx, c)
		})
	})
	return nil
}

func (g *guest) status() *control.Status {
	s := &control.Status{
		Problems: g.problems.List(),
		BootID:   g.bootID,
		Uptime:   time.Since(g.started),
		Memory:   g.memory.Status(),
		Clock:    g.clock.Status(),
		Net:      g.net.Status(),
	}
	if g.disk != nil {
		s.Disk = g.disk.Status()
	}
	s.OK = len(s.Problems) == 0
	return s
}

// do does what is asked for. PowerOff takes effect in after, once the reply is
// out.
func (g *guest) do(ctx context.Context, req control.Request) (reply control.Reply, after func()) {
	after = func() {}
	var err error
	switch req.Do {
	case control.GetStatus:
	case control.SetMemory:
		if err = errMissing; req.Memory != nil {
			err = g.memory.Set(*req.Memory)
		}
	case control.SetDisk:
		if err = errMissing; req.Disk != nil {
			err = errors.New("this guest has no disk")
			if g.disk != nil {
				err = g.disk.Set(*req.Disk)
			}
		}
	case control.SetTick:
		err = g.clock.SetTick(req.Tick)
	case control.ResetClock:
		g.clock.Reset()
	case control.CheckAll:
		err = g.checkAll(ctx)
	case control.PowerOff:
		after = g.off
	default:
		err = fmt.Errorf("no such verb: %q", req.Do)
	}
	if err != nil {
		return control.Reply{Error: err.Error()}, after
	}
	return control.Reply{Status: g.status()}, after
}

var errMissing = errors.New("the setting is missing")

// checkAll checks memory and disk. What it finds is in the status.
func (g *guest) checkAll(ctx context.Context) error {
	if _, err := g.memory.CheckAll(ctx); err != nil {
		return err
	}
	if g.disk != nil {
		if _, err := g.disk.CheckAll(ctx); err != nil {
			return err
		}
	}
	return nil
}
