from psyche.cli import main

main()
