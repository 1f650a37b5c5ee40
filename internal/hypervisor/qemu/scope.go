package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/unit"
	"github.com/godbus/dbus/v5"
)

// scopeTimeout bounds what systemd may take to make a scope.
const scopeTimeout = 5 * time.Second

// ownScope moves a fresh QEMU out of the agent's unit into a systemd scope of
// its own: limits and accounting of the agent's are not the guest's, and
// systemd shows and ends guests by themselves. Without systemd, or when the
// agent is no unit of it, the process stays where it is. So it does when the
// scope cannot be made, which the unit's KillMode=process provides for.
func (d *Driver) ownScope(ctx context.Context, guest string, pid int) {
	agent, err := ownUnit()
	if err == nil && agent != "" {
		err = startScope(ctx, scopeName(guest, pid), scopeProperties(guest, pid, agent))
	}
	if err != nil {
		d.log.Warn("a guest stays in the agent's unit, not in a scope of its own", "guest", guest, "pid", pid, "error", err)
	}
}

// ownUnit is the unit of systemd that this process is the main process of, or
// empty.
func ownUnit() (string, error) {
	// systemd says which process a service's variables are meant for: a shell
	// below a unit inherits them.
	if os.Getenv("SYSTEMD_EXEC_PID") != strconv.Itoa(os.Getpid()) {
		return "", nil
	}
	if _, err := os.Stat("/run/systemd/system"); errors.Is(err, fs.ErrNotExist) {
		return "", nil // it is not the system's init
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("find the agent's unit: %w", err)
	}
	return unitOf(string(text)), nil
}

// unitOf finds the service in what /proc/PID/cgroup says: lines of
// hierarchy:controllers:path, where systemd's hierarchy is 0 or name=systemd.
func unitOf(cgroup string) string {
	for line := range strings.Lines(cgroup) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 || fields[0] != "0" && fields[1] != "name=systemd" {
			continue
		}
		if name := path.Base(fields[2]); strings.HasSuffix(name, ".service") {
			return name
		}
	}
	return ""
}

// scopeName is unique as long as the process lives: the scope of an earlier run
// of the guest may not have gone yet.
func scopeName(guest string, pid int) string {
	return fmt.Sprintf("lmctl-guest-%s-%d.scope", unit.UnitNameEscape(guest), pid)
}

func scopeProperties(guest string, pid int, agent string) []systemd.Property {
	return []systemd.Property{
		systemd.PropDescription("lmctl guest " + guest),
		systemd.PropPids(uint32(pid)),
		systemd.PropSlice("machine.slice"),
		// When the host goes down, the agent ends first and may still finish
		// migrations; the disks go last.
		systemd.PropBefore(agent),
		systemd.PropAfter("remote-fs.target", "local-fs.target"),
		// One that failed does not stay to be looked at: the agent has recorded
		// how the guest ended.
		{Name: "CollectMode", Value: dbus.MakeVariant("inactive-or-failed")},
		// The default is a share of the host's, meant for services.
		{Name: "TasksMax", Value: dbus.MakeVariant(^uint64(0))},
	}
}

// startScope asks systemd for a scope and waits until it is there.
func startScope(ctx context.Context, name string, properties []systemd.Property) error {
	ctx, cancel := context.WithTimeout(ctx, scopeTimeout)
	defer cancel()
	// The connection ends with ctx, and with it every wait for an answer.
	conn, err := systemd.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	defer conn.Close()
	done := make(chan string, 1)
	if _, err := conn.StartTransientUnitContext(ctx, name, "fail", properties, done); err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("make %s: systemd's job ended with %q", name, result)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("make %s: %w", name, ctx.Err())
	}
}
