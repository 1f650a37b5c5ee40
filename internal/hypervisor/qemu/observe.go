package qemu

import (
	"context"
	"time"
)

// Observer is a QMP connection for those who watch a guest besides its driver,
// at the socket that Info.Observer names. It may be used concurrently.
type Observer struct{ mon *monitor }

// Event is something that QEMU said of itself.
type Event struct {
	Name     string
	Data     map[string]any
	Stamp    time.Time // when QEMU says that it happened
	Received time.Time
}

// Text is a string in the event's data, empty if there is none.
func (e Event) Text(key string) string {
	s, _ := e.Data[key].(string)
	return s
}

// Observe connects to a guest's observer socket. It takes one client at a time.
func Observe(ctx context.Context, path string) (*Observer, error) {
	mon, err := dialMonitor(ctx, path)
	if err != nil {
		return nil, err
	}
	return &Observer{mon: mon}, nil
}

// Run executes a QMP command and decodes its result into out, which may be nil.
func (o *Observer) Run(ctx context.Context, command string, args, out any) error {
	return o.mon.run(ctx, command, args, out)
}

// Events are all events from now on. The caller closes them.
func (o *Observer) Events() *Events { return &Events{sub: o.mon.subscribe()} }

// Close ends the connection. The guest does not notice.
func (o *Observer) Close() error { return o.mon.close() }

// Events is a queue of events, in order.
type Events struct{ sub *subscription }

// Next waits for an event. It fails when the connection has ended, as it does
// with QEMU.
func (e *Events) Next(ctx context.Context) (Event, error) {
	ev, err := e.sub.next(ctx)
	if err != nil {
		return Event{}, err
	}
	stamp := time.Unix(ev.Timestamp.Seconds, ev.Timestamp.Microseconds*1000)
	return Event{Name: ev.Event.Event, Data: ev.Data, Stamp: stamp, Received: ev.received}, nil
}

// Close ends the queue.
func (e *Events) Close() { e.sub.close() }
