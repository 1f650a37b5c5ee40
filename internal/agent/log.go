package agent

import (
	"io"
	"log/slog"
)

func (c LogConfig) level() (slog.Level, error) {
	var l slog.Level
	err := l.UnmarshalText([]byte(c.Level))
	return l, err
}

// NewLogger makes the agent's logger.
func NewLogger(c LogConfig, w io.Writer) *slog.Logger {
	level, err := c.level()
	if err != nil { // checked when the configuration was read
		level = slog.LevelInfo
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}
