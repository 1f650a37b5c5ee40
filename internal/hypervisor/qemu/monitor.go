package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

// monitor is a QMP connection. It speaks with the types of go-qemu's qmp
// package but not with its SocketMonitor, which has three faults that matter
// here: a response is handed over in the buffer that the next event is read
// into, a line over 64 KiB (a list of all device types is one) ends the
// connection, and without ids a command that timed out leaves its answer to
// the next one.
type monitor struct {
	conn    *net.UnixConn
	version qmp.Version
	done    chan struct{} // closed when the reader has ended

	write sync.Mutex

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan reply
	subs    map[*subscription]struct{}
	err     error // why the reader ended
}

// event is a QMP event with the time at which it was read, monotonic.
type event struct {
	qmp.Event
	received time.Time
}

// text is a string in the event's data, empty if there is none.
func (e event) text(key string) string {
	s, _ := e.Data[key].(string)
	return s
}

// sent is when QEMU says it made the event, by CLOCK_REALTIME, in microseconds.
func (e event) sent() time.Time {
	return time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*int64(time.Microsecond))
}

// commandError is QEMU's refusal of a command.
type commandError struct {
	Command string
	Class   string
	Desc    string
}

func (e *commandError) Error() string { return fmt.Sprintf("QMP %s: %s", e.Command, e.Desc) }

// errMonitorClosed is the end of a QMP connection, mostly that of QEMU.
var errMonitorClosed = errors.New("QMP connection closed")

type reply struct {
	Return json.RawMessage
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	}
}

type message struct {
	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	qmp.Event
}

type request struct {
	qmp.Command
	ID uint64 `json:"id"`
}

// dialMonitor connects to the QMP socket at path and waits for QEMU's greeting.
func dialMonitor(ctx context.Context, path string) (*monitor, error) {
	conn, err := dialUnix(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("connect to QMP at %s: %w", path, err)
	}
	m := &monitor{
		conn:    conn,
		done:    make(chan struct{}),
		pending: make(map[uint64]chan reply),
		subs:    make(map[*subscription]struct{}),
	}
	dec := json.NewDecoder(conn)
	if err := m.greet(ctx, dec); err != nil {
		return nil, errors.Join(fmt.Errorf("QMP greeting at %s: %w", path, err), conn.Close())
	}
	go m.read(dec)
	return m, nil
}

// dialUnix connects to a socket whose path may be longer than an address may.
func dialUnix(ctx context.Context, path string) (*net.UnixConn, error) {
	dir, base, err := openParent(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", shortPath(dir, base))
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

func openParent(path string) (dir *os.File, base string, err error) {
	dir, err = os.Open(filepath.Dir(path))
	return dir, filepath.Base(path), err
}

// shortPath names a file in an open directory, within the 107 bytes that a
// socket address has for it.
func shortPath(dir *os.File, base string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), base)
}

func (m *monitor) greet(ctx context.Context, dec *json.Decoder) error {
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetDeadline(time.Unix(1, 0)) })
	err := m.handshake(dec)
	if !stop() && err != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	return m.conn.SetDeadline(time.Time{})
}

func (m *monitor) handshake(dec *json.Decoder) error {
	var greeting struct {
		QMP *struct {
			Version qmp.Version `json:"version"`
		} `json:"QMP"`
	}
	if err := dec.Decode(&greeting); err != nil {
		return err
	}
	if greeting.QMP == nil {
		return errors.New("this is no QMP server")
	}
	m.version = greeting.QMP.Version
	if _, err := m.conn.Write([]byte(`{"execute":"qmp_capabilities","id":0}` + "\n")); err != nil {
		return err
	}
	for {
		var r message
		if err := dec.Decode(&r); err != nil {
			return err
		}
		switch {
		case r.Error != nil:
			return &commandError{Command: "qmp_capabilities", Class: r.Error.Class, Desc: r.Error.Desc}
		case r.ID != nil:
			return nil
		}
	}
}

// read hands out replies and events until the connection ends. It never waits
// for those who take them.
func (m *monitor) read(dec *json.Decoder) {
	var err error
	for {
		var msg message
		if err = dec.Decode(&msg); err != nil {
			break
		}
		now := time.Now()
		m.mu.Lock()
		if msg.Event.Event != "" {
			for s := range m.subs {
				s.add(event{Event: msg.Event, received: now})
			}
		} else if msg.ID != nil {
			if c, ok := m.pending[*msg.ID]; ok {
				delete(m.pending, *msg.ID)
				c <- reply{Return: msg.Return, Error: msg.Error} // has room for one
			}
		}
		m.mu.Unlock()
	}
	m.mu.Lock()
	m.err = fmt.Errorf("%w: %w", errMonitorClosed, err)
	close(m.done)
	m.mu.Unlock()
}

// run executes a command and decodes its result into out, which may be nil. A
// refusal by QEMU is a *commandError. When ctx ends first, the command may
// still be carried out, and its answer is dropped.
func (m *monitor) run(ctx context.Context, command string, args, out any) error {
	return m.runWithFile(ctx, command, args, out, nil)
}

// runWithFile is run with a descriptor that travels with the command.
func (m *monitor) runWithFile(ctx context.Context, command string, args, out any, file *os.File) error {
	answer := make(chan reply, 1)
	m.mu.Lock()
	m.next++
	id := m.next
	m.pending[id] = answer
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.pending, id)
		m.mu.Unlock()
	}()

	line, err := json.Marshal(request{Command: qmp.Command{Execute: command, Args: args}, ID: id})
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	if err := m.send(append(line, '\n'), file); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case r := <-answer:
		if r.Error != nil {
			return &commandError{Command: command, Class: r.Error.Class, Desc: r.Error.Desc}
		}
		if out == nil {
			return nil
		}
		if err := json.Unmarshal(r.Return, out); err != nil {
			return fmt.Errorf("QMP %s: read the answer: %w", command, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("QMP %s: no answer: %w", command, ctx.Err())
	case <-m.done:
		return fmt.Errorf("QMP %s: %w", command, m.err)
	}
}

// sendTimeout bounds the wait for a QEMU that does not read its socket.
const sendTimeout = 10 * time.Second

func (m *monitor) send(line []byte, file *os.File) error {
	m.write.Lock()
	defer m.write.Unlock()
	if m.conn == nil {
		return errMonitorClosed
	}
	if err := m.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	n, _, err := m.conn.WriteMsgUnix(line, rights, nil)
	if err == nil && n < len(line) {
		_, err = m.conn.Write(line[n:])
	}
	if err != nil {
		// Half a command would garble the next one.
		return errors.Join(err, m.conn.Close())
	}
	return nil
}

// deadMonitor is one whose connection has ended before it was made.
func deadMonitor() *monitor {
	m := &monitor{done: make(chan struct{}), subs: make(map[*subscription]struct{}), pending: make(map[uint64]chan reply), err: errMonitorClosed}
	close(m.done)
	return m
}

// close ends the connection and waits for the reader.
func (m *monitor) close() error {
	if m.conn == nil {
		return nil
	}
	err := m.conn.Close()
	<-m.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// subscribe collects all events from now on, in order, however slowly they are
// taken. The caller closes the subscription.
func (m *monitor) subscribe() *subscription {
	s := &subscription{m: m, ready: make(chan struct{}, 1)}
	m.mu.Lock()
	m.subs[s] = struct{}{}
	m.mu.Unlock()
	return s
}

// subscription is a queue of events.
type subscription struct {
	m     *monitor
	ready chan struct{}

	mu    sync.Mutex
	queue []event
}

func (s *subscription) add(e event) {
	s.mu.Lock()
	s.queue = append(s.queue, e)
	s.mu.Unlock()
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

func (s *subscription) take() (event, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return event{}, false
	}
	e := s.queue[0]
	s.queue = s.queue[1:]
	return e, true
}

// next waits for an event. After the connection's end it gives those that
// came before, then errMonitorClosed.
func (s *subscription) next(ctx context.Context) (event, error) {
	for {
		if e, ok := s.take(); ok {
			return e, nil
		}
		select {
		case <-s.ready:
		case <-ctx.Done():
			return event{}, ctx.Err()
		case <-s.m.done:
			if e, ok := s.take(); ok {
				return e, nil
			}
			return event{}, s.m.err
		}
	}
}

func (s *subscription) close() {
	s.m.mu.Lock()
	delete(s.m.subs, s)
	s.m.mu.Unlock()
}
