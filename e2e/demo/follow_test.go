package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func newFollowed(t *testing.T) (*os.File, *follower) {
	t.Helper()
	w, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	f, err := follow(w.Name())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return w, f
}

func write(t *testing.T, w *os.File, text string) {
	t.Helper()
	if _, err := w.WriteString(text); err != nil {
		t.Error(err)
	}
}

func TestFollowerGivesLinesAsTheyAreWritten(t *testing.T) {
	w, f := newFollowed(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	write(t, w, "one\ntw")
	if line, err := f.Next(ctx); err != nil || line != "one" {
		t.Fatalf("%q, %v; want one", line, err)
	}
	go write(t, w, "o\n\nthree\n")
	for _, want := range []string{"two", "", "three"} {
		if line, err := f.Next(ctx); err != nil || line != want {
			t.Fatalf("%q, %v; want %q", line, err, want)
		}
	}
}

func TestFollowerGivesTheLastLinesOfAnEndedWriter(t *testing.T) {
	w, f := newFollowed(t)
	gone := errors.New("writer is gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	write(t, w, "last words\nhalf a li")
	cancel(gone)
	if line, err := f.Next(ctx); err != nil || line != "last words" {
		t.Fatalf("%q, %v", line, err)
	}
	if line, err := f.Next(ctx); !errors.Is(err, gone) {
		t.Fatalf("%q, %v; want the cause", line, err)
	}
}

func TestFollowerWakesWhenTheWaitIsOver(t *testing.T) {
	_, f := newFollowed(t)
	gone := errors.New("writer is gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(10*time.Millisecond, func() { cancel(gone) })
	if line, err := f.Next(ctx); !errors.Is(err, gone) {
		t.Fatalf("%q, %v; want the cause", line, err)
	}
}
