package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
)

// object is a JSON object.
type object map[string]any

var (
	// errMonitor is QEMU's own refusal of a command.
	errMonitor = errors.New("QEMU refused")
	// errNoCommand is what QEMU says of a command that it does not know.
	errNoCommand = errors.New("it has no such command")
)

// monitor sends QEMU a command through libvirt, which taints the domain with
// custom-monitor. While libvirt has a job of its own on the domain that waits
// for the job.
func (g *domain) monitor(ctx context.Context, l *link, command string, arguments object, answer any) error {
	request := object{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	text, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	said, err := call(ctx, l, func(l *link) (string, error) {
		return l.QEMUDomainMonitorCommand(g.ref(), string(text), 0)
	})
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	var reply struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(said), &reply); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	if reply.Error != nil && reply.Error.Class == "CommandNotFound" {
		return fmt.Errorf("QMP %s: %w: %w", command, errMonitor, errNoCommand)
	}
	if reply.Error != nil {
		return fmt.Errorf("QMP %s: %w: %s", command, errMonitor, reply.Error.Desc)
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(reply.Return, answer); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	return nil
}

// ignoreShared is the capability by which QEMU leaves memory in shared files out
// of its stream.
const ignoreShared = "x-ignore-shared"

// setIgnoreShared switches the capability.
func (g *domain) setIgnoreShared(ctx context.Context, l *link, on bool) error {
	return g.monitor(ctx, l, "migrate-set-capabilities", object{
		"capabilities": []object{{"capability": ignoreShared, "state": on}},
	}, nil)
}

// switchoverAck is the capability that has QEMU wait for the destination's word
// before it stops the guest.
const switchoverAck = "switchover-ack"

// capabilities are those for migrations that QEMU has, ignoreShared among them,
// and whether they are on.
func (g *domain) capabilities(ctx context.Context, l *link) (map[string]bool, error) {
	var all []struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := g.monitor(ctx, l, "query-migrate-capabilities", nil, &all); err != nil {
		return nil, err
	}
	on := make(map[string]bool, len(all))
	for _, c := range all {
		on[c.Capability] = c.State
	}
	if _, has := on[ignoreShared]; !has {
		return nil, fmt.Errorf("this QEMU has no migration capability %s", ignoreShared)
	}
	return on, nil
}
