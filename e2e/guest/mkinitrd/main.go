// Command mkinitrd makes the test guest's kernel and initrd in a cache folder and
// prints their paths, one a line.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"basalt/e2e/guest/initrd"
)

func main() {
	cache := flag.String("cache", ".cache/guest", "folder for the kernel package and the initrd")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	img, err := initrd.Build(ctx, *cache)
	if err != nil {
		fmt.Fprintln(os.Stderr, "mkinitrd:", err)
		os.Exit(1)
	}
	fmt.Println(img.Kernel)
	fmt.Println(img.Initrd)
}
